"""Exact replay: a recomputed step draws what it drew, and reads what it read.

What comes from torch's global random generators is drawn again.

On a CPU a recomputed step is equal to the bit as long as the number of threads
(``torch.set_num_threads``) stays that of the run: sums are split among threads, and another split
rounds otherwise. :class:`metaopt.trajectory.Checked` notices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from metaopt import tree
from metaopt.tree import Tree


class Rng(NamedTuple):
    """State of torch's CPU generator and, where the weights live on GPUs, of those devices' generators."""

    cpu: Tensor
    cuda: tuple[Tensor, ...] = ()
    devices: tuple[torch.device, ...] = ()


def snapshot(at: Tree) -> Rng:
    """The generators' states now (about 2 µs and 5 KB); ``at`` tells which devices matter."""
    if not torch.cuda.is_initialized():
        return Rng(torch.get_rng_state())
    found = {leaf.device.index: leaf.device for leaf in tree.leaves(at) if isinstance(leaf, Tensor) and leaf.is_cuda}
    return _now(tuple(found[index] for index in sorted(found)))


def same(a: Rng, b: Rng) -> bool:
    """Whether nothing was drawn between the two snapshots."""
    if a.devices != b.devices or not torch.equal(a.cpu, b.cpu):
        return False
    return all(torch.equal(x, y) for x, y in zip(a.cuda, b.cuda, strict=True))


def restore(rng: Rng) -> None:
    """Put the generators back to a snapshot."""
    torch.set_rng_state(rng.cpu)
    for device, state in zip(rng.devices, rng.cuda, strict=True):
        torch.cuda.set_rng_state(state, device)


@contextmanager
def preserved(at: Tree) -> Iterator[None]:
    """Whatever is drawn inside leaves the generators as they were."""
    before = snapshot(at)
    try:
        yield
    finally:
        restore(before)


@contextmanager
def repeated(rng: Rng) -> Iterator[None]:
    """Inside, the same numbers are drawn as after the snapshot; the generators are left as they were."""
    before = _now(rng.devices)
    restore(rng)
    try:
        yield
    finally:
        restore(before)


def _now(devices: tuple[torch.device, ...]) -> Rng:
    return Rng(torch.get_rng_state(), tuple(torch.cuda.get_rng_state(device) for device in devices), devices)


def versions_of(value: Tree) -> tuple[int, ...]:
    """In-place version counters of the tensors: they tell when somebody wrote into one."""
    tensors = [leaf for leaf in tree.leaves(value) if isinstance(leaf, Tensor)]
    try:
        return tuple([x._version for x in tensors])
    except RuntimeError:  # tensors made in inference mode do not count
        return tuple([x._version for x in tensors if not x.is_inference()])


def check_unwritten(value: Tree, versions: tuple[int, ...], what: str, remedy: str) -> None:
    """Raise a ``RuntimeError`` that names the first leaf which was written into since its versions were taken."""
    if versions_of(value) == versions:
        return
    counted = [
        (name, leaf._version)
        for name, leaf in zip(tree.names(value), tree.leaves(value), strict=True)
        if isinstance(leaf, Tensor) and not leaf.is_inference()
    ]
    name = next(name for (name, now), then in zip(counted, versions, strict=True) if now != then)
    raise RuntimeError(f"{what} at {name} was changed in place, so that the step cannot be replayed: {remedy}")
