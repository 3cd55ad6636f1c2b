"""Parametrisations whose second derivatives are right, in place of torch's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from metaopt.layers.statistics import SpectralNorm

FusedWeightNorm = torch.nn.utils.parametrizations._WeightNorm  # pyright: ignore[reportPrivateUsage]


class ComposedWeightNorm(nn.Module):
    """``g · v / ‖v‖`` from operations whose second derivatives are right."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    @override
    def forward(self, weight_g: Tensor, weight_v: Tensor) -> Tensor:
        if self.dim == -1:
            return weight_v * (weight_g / weight_v.norm())
        others = [axis for axis in range(weight_v.ndim) if axis != self.dim % weight_v.ndim]
        return weight_v * (weight_g / weight_v.pow(2).sum(others, keepdim=True).sqrt())


class SpectralNormThroughIterations(SpectralNorm):
    """``W / (uᵀ W v)`` where u and v are functions of W."""

    @override
    def forward(self, weight: Tensor) -> Tensor:
        if weight.ndim == 1:
            return nn.functional.normalize(weight, dim=0, eps=self.eps)
        matrix = self._reshape_weight_to_matrix(weight)
        u = self._u
        v = self._v
        if self.training:
            for _ in range(self.n_power_iterations):
                u = nn.functional.normalize(torch.mv(matrix, v), dim=0, eps=self.eps)
                v = nn.functional.normalize(torch.mv(matrix.H, u), dim=0, eps=self.eps)
            self._u = u
            self._v = v
        return weight / torch.vdot(u, torch.mv(matrix, v))
