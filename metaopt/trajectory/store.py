"""Where remembered states are kept: by reference, in another device's memory, or in memory-mapped files."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from metaopt import tree
from metaopt.inner.state import InnerState


class Store(Protocol):
    """A place for states. What :meth:`put` returns is dropped with the last reference to it."""

    def put(self, state: InnerState) -> Any:
        """Keep a state; the result stands for it."""
        ...

    def get(self, kept: Any) -> InnerState:
        """The state, to the bit, on the device it came from."""
        ...


@dataclass(frozen=True)
class ByReference(Store):
    """The tensors themselves, not copied."""

    @override
    def put(self, state: InnerState) -> InnerState:
        return state

    @override
    def get(self, kept: InnerState) -> InnerState:
        return kept


class Away(NamedTuple):
    """A state elsewhere.

    Attributes:
        state: what stands for it there.
        home: the device that each leaf came from; ``None`` where it is not a tensor.
    """

    state: InnerState
    home: list[torch.device | None]


class Elsewhere:
    """The way back, which is one for all stores that copy a state away."""

    def get(self, kept: Away) -> InnerState:
        """The state on the devices it came from (pages of a mapped file come in when they are read)."""
        flat, spec = tree.flatten(kept.state)
        return tree.unflatten([x if d is None else x.to(d) for x, d in zip(flat, kept.home, strict=True)], spec)


def _home(state: InnerState) -> list[torch.device | None]:
    return [leaf.device if isinstance(leaf, Tensor) else None for leaf in tree.leaves(state)]


@dataclass(frozen=True)
class OnDevice(Elsewhere):
    """Copies on another device (usually ``"cpu"``, for a run on a GPU)."""

    device: str

    def put(self, state: InnerState) -> Away:
        """A copy of the state on that device."""
        there = tree.map(lambda x: x.to(self.device, copy=True) if isinstance(x, Tensor) else x, state)
        return Away(there, _home(state))


@dataclass(frozen=True)
class OnDisk(Elsewhere):
    """One memory-mapped file per state in ``directory``.

    The file never has a name where the file system allows that (Linux), and elsewhere loses it as
    soon as it is mapped, so nothing is left behind, not even by a process that is killed; the space
    is given back when the state is dropped.
    """

    directory: str

    def put(self, state: InnerState) -> Away:
        """Write it to a file, and map that.

        Raises:
            OSError: if the disk is full or the directory cannot be written to; it names the
                directory.
        """
        tensors = [leaf for leaf in tree.leaves(state) if isinstance(leaf, Tensor)]
        starts = []
        size = 0
        for tensor in tensors:
            starts.append(size)
            size += -(-tensor.numel() * tensor.element_size() // 64) * 64
        supply = iter(zip(starts, tensors, strict=True))
        mapped = self._map(max(size, 1))

        def place(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            start, tensor = next(supply)
            nbytes = tensor.numel() * tensor.element_size()
            there = mapped[start : start + nbytes].view(tensor.dtype).view(tensor.shape)
            return there.copy_(tensor.detach())

        return Away(tree.map(place, state), _home(state))

    def _map(self, size: int) -> Tensor:
        try:
            Path(self.directory).mkdir(parents=True, exist_ok=True)
            descriptor, name, named = _new_file(self.directory)
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(descriptor, 0, size)  # a full disk is an error here, not a SIGBUS later
                return torch.from_file(name, shared=True, size=size, dtype=torch.uint8)
            finally:
                os.close(descriptor)
                if named:
                    os.unlink(name)
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot keep a state of {size:,} bytes in {self.directory!r} ({error.strerror}): make room there, "
                "hold fewer states "
                "(of=mo.trajectory.Checkpointed(slots=...)), or give another directory",
            ) from error


def _new_file(directory: str) -> tuple[int, str, bool]:
    """``(descriptor, path, whether it has a name)``: an empty file without a name where there is such a thing."""
    try:
        descriptor = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        return descriptor, f"/proc/self/fd/{descriptor}", False
    except (AttributeError, OSError):
        return *tempfile.mkstemp(prefix="metaopt-", suffix=".state", dir=directory), True
