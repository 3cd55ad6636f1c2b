"""Which layers of a private copy are exchanged, and for what."""

from __future__ import annotations

from torch import nn

from metaopt.layers import batch_norm, linear, max_pool
from metaopt.layers.parametrisations import (
    ComposedWeightNorm,
    FusedWeightNorm,
    SpectralNorm,
    SpectralNormThroughIterations,
)


def twice_differentiable(module: nn.Module) -> nn.Module:
    """The same module, its layers exchanged in place."""
    for submodule in module.modules():
        if type(submodule) in batch_norm.LEAN:
            batch_norm.lean(submodule)
        if type(submodule) is nn.MaxPool2d:
            submodule.__class__ = max_pool.LeanMaxPool2d
        if type(submodule) is nn.Linear:
            submodule.__class__ = linear.LeanLinear
        if type(submodule) is nn.Sequential:
            submodule.__class__ = max_pool.LeanSequential
        if isinstance(submodule, nn.utils.parametrize.ParametrizationList):
            for index, parametrization in enumerate(submodule):
                if isinstance(parametrization, FusedWeightNorm):
                    submodule[index] = ComposedWeightNorm(parametrization.dim)
                elif type(parametrization) is SpectralNorm:
                    parametrization.__class__ = SpectralNormThroughIterations
    return module
