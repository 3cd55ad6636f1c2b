"""Which layers of a private copy compute in another way, and how.

Each keeps its class and its hooks: only ``forward`` of the one layer is exchanged.
"""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

from torch import nn

from metaopt.layers import batch_norm, instance_norm, linear, max_pool, sequence
from metaopt.layers.parametrisations import (
    ComposedWeightNorm,
    FusedWeightNorm,
    SpectralNormThroughIterations,
)
from metaopt.layers.statistics import SpectralNorm

_FORWARDS: dict[type[nn.Module], Any] = {
    **dict.fromkeys(batch_norm.TYPES, batch_norm.forward),
    nn.MaxPool2d: max_pool.forward,
    nn.Linear: linear.forward,
}


def twice_differentiable(module: nn.Module) -> None:
    """Exchange, in place, the parametrisations whose second derivative is wrong in torch."""
    for submodule in module.modules():
        if not isinstance(submodule, nn.utils.parametrize.ParametrizationList):
            continue
        for index, parametrisation in enumerate(submodule):
            if isinstance(parametrisation, FusedWeightNorm):
                submodule[index] = ComposedWeightNorm(parametrisation.dim)
            elif type(parametrisation) is SpectralNorm:
                parametrisation.__class__ = SpectralNormThroughIterations


def lean(module: nn.Module) -> None:
    """Exchange, in place, the forward passes of layers that have a leaner one in eager mode."""
    for ordered, layers in sequence.orders(module):
        _exchange(ordered, "forward", partial(sequence.forward, layers))
    for layer in list(module.modules()):
        if "dynamo_ctx" in vars(layer):  # a compiled part has no second derivative: what it was made from has
            _exchange(layer, "forward", layer.get_submodule("_orig_mod").__call__)
        if "forward" in vars(layer):
            continue
        if type(layer) in _FORWARDS:
            _exchange(layer, "forward", MethodType(_FORWARDS[type(layer)], layer))
        if type(layer) in instance_norm.TYPES:
            _exchange(layer, "_apply_instance_norm", MethodType(instance_norm.apply, layer))


def _exchange(layer: nn.Module, method: str, instead: Any) -> None:
    vars(layer)[method] = instead


def idle(module: nn.Module) -> list[str]:
    """Names of the running statistics that a plain call may leave out: their layers would only move them."""
    names = []
    for name, layer in module.named_modules():
        if not layer.training or "forward" in vars(layer):
            continue
        if type(layer) in (*batch_norm.TYPES, *instance_norm.TYPES):
            names += [f"{name}.{buffer}" if name else buffer for buffer, x in layer._buffers.items() if x is not None]
    return names
