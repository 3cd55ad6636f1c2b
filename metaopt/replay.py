"""Exact replay: what a step drew from torch's global random generators is drawn again when the step is recomputed.

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
    """State of torch's CPU generator and, where the weights live on a GPU, of that device's generator."""

    cpu: Tensor
    cuda: Tensor | None = None
    device: torch.device | None = None


def snapshot(at: Tree) -> Rng:
    """The generators' states now (about 2 µs and 5 KB); ``at`` tells which device matters."""
    cpu = torch.get_rng_state()
    if not torch.cuda.is_initialized():
        return Rng(cpu)
    for leaf in tree.leaves(at):
        if isinstance(leaf, Tensor) and leaf.is_cuda:
            return Rng(cpu, torch.cuda.get_rng_state(leaf.device), leaf.device)
    return Rng(cpu)


def same(a: Rng, b: Rng) -> bool:
    """Whether nothing was drawn between the two snapshots."""
    return torch.equal(a.cpu, b.cpu) and (
        a.cuda is b.cuda or (a.cuda is not None and b.cuda is not None and torch.equal(a.cuda, b.cuda))
    )


def restore(rng: Rng) -> None:
    """Put the generators back to a snapshot."""
    torch.set_rng_state(rng.cpu)
    if rng.cuda is not None and rng.device is not None:
        torch.cuda.set_rng_state(rng.cuda, rng.device)


@contextmanager
def preserved(at: Tree) -> Iterator[None]:
    """Whatever is drawn inside leaves the generators as they were."""
    before = snapshot(at)
    try:
        yield
    finally:
        restore(before)
