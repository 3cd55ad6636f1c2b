r"""Running statistics of normalisation layers, as pure and differentiable functions.

.. math::
    \mu' = m\, \mathrm{mean}(x) + (1 - m)\, \mu, \qquad
    \sigma^{2\prime} = m\, \mathrm{var}(x) + (1 - m)\, \sigma^2

Torch writes them in place, outside autograd. Where something is differentiated or mapped, they are
new tensors here that depend on x and on the old ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SpectralNorm = torch.nn.utils.parametrizations._SpectralNorm  # pyright: ignore[reportPrivateUsage]


class Absent:
    """What stands in a slot that has nothing to compute with; whatever is computed with it is an error."""

    message = (
        "a part of a module was run outside of the call that gave it its parameters: call the wrapped model as a "
        "whole, model(params, …)"
    )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(cls.message)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name) if name.startswith("__") else RuntimeError(self.message)


class Idle(Absent):
    """Stands for a running statistic that a layer would only move, where nobody asks for the moved one."""

    message = (
        "the forward pass reads running statistics that model(params, …) does not compute in training mode: call "
        "model.with_buffers(params, model.buffers, …), which returns (output, buffers)"
    )


def move(layer: Any, mean: Tensor, variance: Tensor, momentum: float | Tensor) -> None:
    """Put moved statistics in the place of the old ones."""
    old_mean = layer.running_mean
    old_variance = layer.running_var
    layer.running_mean = momentum * mean.to(old_mean.dtype) + (1 - momentum) * old_mean
    layer.running_var = momentum * variance.to(old_variance.dtype) + (1 - momentum) * old_variance


def normalised(layer: Any, x: Tensor) -> Tensor:
    """``γ (x - μ) / (σ² + ε)^½ + β`` by the running statistics, differentiable in them."""
    shape = [1, -1, *[1] * (x.ndim - 2)]
    scale = (layer.running_var + layer.eps).rsqrt()
    if layer.weight is not None:
        scale = scale * layer.weight
    y = (x - layer.running_mean.view(shape)) * scale.view(shape)
    return y if layer.bias is None else y + layer.bias.view(shape)


def moving(module: nn.Module) -> list[str]:
    """Names of the layers whose statistics a training pass moves."""
    return [name for name, layer in module.named_modules() if layer.training and _holds(layer)]


def _holds(layer: nn.Module) -> bool:
    if isinstance(layer, SpectralNorm):
        return True
    return isinstance(layer, nn.modules.batchnorm._NormBase) and layer.running_mean is not None
