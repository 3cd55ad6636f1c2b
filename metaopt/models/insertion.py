"""Learned layers put behind layers of any module, whose own parameters keep their names."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from metaopt import tree
from metaopt.functional import FunctionalModel, Params, functional, partition

NAME = "inserted"
"""The name of an inserted layer inside the layer that it follows."""

_SIZES = ("num_features", "out_features", "out_channels", "num_channels", "embedding_dim")


def insert(module: nn.Module, after: Sequence[str], make: Callable[[nn.Module], nn.Module]) -> FunctionalModel:
    """A pure function of ``module`` in which ``make(layer)`` follows each of the named layers.

    ``module`` stays as it is.

    Parameters of what was inserted are called ``LAYER.inserted.…``; :func:`split` finds them.
    """
    whole = copy.deepcopy(module)
    for name in after:
        layer = whole.get_submodule(name)
        like = next(whole.parameters())
        layer.add_module(NAME, make(layer).to(like.device, like.dtype))
        if not isinstance(layer, nn.Sequential):  # a child added to a sequential is called by it
            layer.register_forward_hook(_call_inserted)
    return functional(whole)


def split(params: Params) -> tuple[Params, Params]:
    """``(w, lam)``: the module's own parameters, and those of what was inserted."""
    return partition(params, lambda name: NAME not in name.split("."))


def choose(
    module: nn.Module, after: Sequence[str] | None, default: type[nn.Module] | tuple[type[nn.Module], ...]
) -> list[str]:
    """Names of the layers that match one of the glob patterns ``after``, or (``None``) that are of the default kind.

    Raises:
        ValueError: if there are none.
    """
    layers: Mapping[str, nn.Module] = {name: layer for name, layer in module.named_modules() if name}
    if after is None:
        found = [name for name, layer in layers.items() if isinstance(layer, default)]
        kinds = " or ".join(kind.__name__ for kind in (default if isinstance(default, tuple) else (default,)))
        missing = [] if found else [f"a {kinds}"]
    else:
        found = [name for name in layers if tree.matches(name, after)]
        missing = [pattern for pattern in after if not any(tree.matches(name, [pattern]) for name in layers)]
    if missing or not found:
        raise ValueError(
            f"the module has no layer {', '.join(missing) or 'chosen'}: name some in after=, of {list(layers)}"
        )
    return found


def channels_of(layer: nn.Module) -> int:
    """How many channels (features) a layer's output has, read off its last part that says so.

    Raises:
        ValueError: if no part does.
    """
    for part in reversed(list(layer.modules())):
        if isinstance(part, nn.LayerNorm):
            return part.normalized_shape[-1]
        for size in _SIZES:
            if isinstance(getattr(part, size, None), int):
                return getattr(part, size)
    raise ValueError(
        f"the number of channels after {type(layer).__name__} cannot be read off it: choose a layer with "
        f"{', '.join(_SIZES)}"
    )


def _call_inserted(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return layer.get_submodule(NAME)(output)
