"""Private copies of a module, with slots into which a call puts its tensors.

A copy serves one call at a time. Calls in other threads, or inside a forward pass, take another
copy, so that a wrapped model is a pure function for all of them. What ``torch.utils.checkpoint``
recomputes later finds its copy as it was: a copy to which a graph still refers is given up, not
used again.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Mapping
from sys import getrefcount
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from metaopt.layers.lean import lean
from metaopt.layers.statistics import Absent

_ABSENT: Any = Absent()


class Skeleton:
    """One copy of a template: its layers lean, its tensors slots.

    Attributes:
        module: the copy.
    """

    def __init__(self, template: nn.Module, params: Container[str], buffers: Container[str]) -> None:
        """Copy the template; ``params`` and ``buffers`` name those of its tensors that become slots."""
        self.module = sharing_copy(template, {})
        self._params = _places(self.module, "_parameters", dict(self.module.named_parameters()), params)
        self._buffers = _places(self.module, "_buffers", dict(self.module.named_buffers()), buffers)
        lean(self.module)
        self._modules = list(self.module.modules())
        self.clear()
        self._references = self._count()

    def fill(self, params: Mapping[str, Tensor], buffers: Mapping[str, Any]) -> None:
        """Put tensors into the slots."""
        for name, holder, key in self._params:
            holder[key] = params[name]
        for name, holder, key in self._buffers:
            holder[key] = buffers[name]

    def clear(self) -> None:
        """Leave nothing in the slots that could be computed with."""
        for _, holder, key in self._params:
            holder[key] = _ABSENT
        for _, holder, key in self._buffers:
            holder[key] = _ABSENT

    def buffers(self) -> dict[str, Tensor]:
        """What the slots of buffers hold now."""
        return {name: holder[key] for name, holder, key in self._buffers}

    def in_use(self) -> bool:
        """Whether anything outside refers to a part of the copy, such as a graph that will recompute it."""
        return self._count() != self._references

    def _count(self) -> list[int]:
        return list(map(getrefcount, self._modules))


def sharing_copy(module: nn.Module, instead: dict[int, Tensor]) -> nn.Module:
    """A deep copy of a module, but of its tensors: ``instead[id(x)]`` stands for x, or x itself.

    Raises:
        TypeError: if a part of the module cannot be copied.
    """
    with _Sharing():
        try:
            return copy.deepcopy(module, dict[int, Any](instead))
        except (TypeError, RuntimeError) as error:
            raise TypeError(
                f"functional() copies the module, and {_culprit(module)} cannot be copied: {error}. "
                "Remove it before wrapping, or give its class a __deepcopy__"
            ) from error


def _culprit(module: nn.Module) -> str:
    for name, layer in module.named_modules():
        for key, value in vars(layer).items():
            if key in ("_parameters", "_buffers", "_modules"):
                continue
            try:
                copy.deepcopy(value)
            except (TypeError, RuntimeError):
                where = f"of {name!r} ({type(layer).__name__})" if name else f"of {type(layer).__name__}"
                return f"the attribute {key!r} {where}"
    return f"{type(module).__name__}"


class _Sharing(TorchFunctionMode):
    """Deep copies of tensors are the tensors themselves, cut off from their graph."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer ``__deepcopy__``; leave all else to torch."""
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        x = args[0]
        return x.detach() if x.requires_grad else x


def _places(
    module: nn.Module, kind: str, tensors: dict[str, Any], chosen: Container[str]
) -> list[tuple[str, dict[str, Any], str]]:
    """``(name, holder, key)`` of every place that holds one of the chosen tensors: a tied one has several."""
    name_of = {id(tensor): name for name, tensor in tensors.items() if name in chosen}
    places = []
    for submodule in module.modules():
        holder = getattr(submodule, kind)
        for key, tensor in holder.items():
            if id(tensor) in name_of:
                places.append((name_of[id(tensor)], holder, key))
    return places
