"""How many bytes graphs hold."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from metaopt import tree
from metaopt.tree import Tree

T = TypeVar("T")


def weighed(make: Callable[[], T], known: Tree) -> tuple[T, int]:
    """What ``make`` returns, and the bytes of what autograd saved for it, without what ``known`` holds anyway.

    The transforms of ``torch.func`` refuse the hooks that see what is saved. Then ``make`` is
    called again, and what is still alive after it counts.
    """
    elsewhere = {_address(x) for x in tree.leaves(known) if isinstance(x, Tensor)}
    held: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if (address := storage.data_ptr()) not in elsewhere:
            held[address] = storage.nbytes()
        return saved

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            return make(), sum(held.values())
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):
            raise
    with Allocations() as made:  # entering takes a second the first time, since torch imports its compiler
        result = make()
    return result, sum(size for address, size in made.alive().items() if address not in elsewhere)


class Allocations(TorchDispatchMode):
    """Remembers the memory of every tensor that an operation gives back."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._made |= {_address(x): weakref.ref(x.untyped_storage()) for x in tree.leaves(out) if isinstance(x, Tensor)}
        return out

    def alive(self) -> dict[int, int]:
        """Address and bytes of what is still in use."""
        return {address: storage.nbytes() for address, ref in self._made.items() if (storage := ref()) is not None}


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
