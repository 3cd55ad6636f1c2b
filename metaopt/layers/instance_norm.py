"""Instance normalisation with running statistics, which are differentiable and may be mapped over tasks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from metaopt.layers import statistics
from metaopt.layers.eager import followed

TYPES = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def apply(layer: Any, x: Tensor) -> Tensor:
    """Torch's ``_apply_instance_norm`` on a batch ``[N, C, …]``."""
    mean = layer.running_mean
    tracked = isinstance(mean, Tensor)
    if not layer.training and tracked:
        if followed(mean, layer.running_var):
            return statistics.normalised(layer, x)
        return type(layer)._apply_instance_norm(layer, x)
    if tracked and not followed(x, mean, layer.running_var):
        return type(layer)._apply_instance_norm(layer, x)

    y = nn.functional.instance_norm(x, None, None, layer.weight, layer.bias, True, 0.0, layer.eps)
    if tracked:
        over = list(range(2, x.ndim))
        momentum = 0.0 if layer.momentum is None else layer.momentum
        statistics.move(layer, x.mean(over).mean(0), x.var(over).mean(0), momentum)
    return y
