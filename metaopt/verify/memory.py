"""Peak tensor memory of a call: what torch's operations allocate and still hold, in bytes.

On a CPU nobody keeps this count: the resident set's peak (what ``benchmarks/`` measures, in a
separate process) cannot be reset and includes the allocator's slack, and the profiler takes
seconds and writes to the terminal. Here every new storage that an operation returns is added when
it appears and subtracted when it is freed; a kernel's scratch space inside one operation is not
seen. On a GPU the caching allocator's own peak is used. The count slows small operations down
several times: measure time in another call.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from metaopt import tree


def peak_bytes(call: Callable[[], Any], device: torch.device | None = None) -> int:
    """The most bytes that tensors made during ``call()`` held at one time.

    What existed before is not counted.

    Args:
        call: is run once.
        device: a CUDA device to measure; default: the CPU.

    >>> peak_bytes(lambda: torch.ones(1000).sum())
    4004
    """
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _Allocations() as seen:
        call()
    return seen.peak


class _Allocations(TorchDispatchMode):
    """Live bytes, and their peak, of the storages that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation; count what is new."""
        named = kwargs or {}
        out = func(*args, **named)

        inputs = _tensors((args, tuple(named.values())))
        given = {id(x.untyped_storage()) for x in inputs}
        for x in _tensors(out):
            storage = x.untyped_storage()
            if id(storage) not in given and id(storage) not in self._storages:
                self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        size = storage.nbytes()

        def freed(_: Any) -> None:
            self.live -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


def _tensors(values: Any) -> Iterable[Tensor]:
    for x in tree.leaves(values):
        if isinstance(x, Tensor) and x.layout == torch.strided:
            yield x
