r"""Hyperparameters with a range, as functions of numbers without one, each with its inverse.

λ holds the free number, the optimiser or the loss gets its image:
``lam = {"lr": positive.inverse(torch.tensor(0.1))}`` with ``SGD(lr=mo.by("lr", positive))``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metaopt import checks


@dataclass(frozen=True)
class Positive:
    r""":math:`e^x`, in :math:`(0, \infty)`.

    >>> float(Positive()(Positive().inverse(torch.tensor(0.5))))
    0.5
    """

    def __call__(self, x: Tensor) -> Tensor:
        """The positive number of a free one."""
        return x.exp()

    def inverse(self, value: Tensor) -> Tensor:
        """The free number whose image is ``value``.

        Raises:
            ValueError: if the value is not above 0.
        """
        _check((value > 0).all(), value, "above 0")
        return value.log()


@dataclass(frozen=True)
class Interval:
    r""":math:`a + (b - a)\,\sigma(x)`, in :math:`(a, b)`.

    Args:
        low: a.
        high: b, above a.

    >>> float(Interval(0.0, 2.0)(torch.tensor(0.0)))
    1.0
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        checks.finite(self, "low", self.low)
        checks.finite(self, "high", self.high)
        if not self.low < self.high:
            raise ValueError(f"Interval: low must be below high, got {self.low} and {self.high}")

    def __call__(self, x: Tensor) -> Tensor:
        """The number in the interval of a free one."""
        return self.low + (self.high - self.low) * torch.sigmoid(x)

    def inverse(self, value: Tensor) -> Tensor:
        """The free number whose image is ``value``.

        Raises:
            ValueError: if the value is not inside.
        """
        inside = (value > self.low) & (value < self.high)
        _check(inside.all(), value, f"between {self.low} and {self.high}")
        return torch.logit((value - self.low) / (self.high - self.low))


@dataclass(frozen=True)
class Simplex:
    r""":math:`\operatorname{softmax}(x)` over the last axis: positive numbers that sum to 1.

    >>> Simplex()(torch.zeros(4))
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """

    def __call__(self, x: Tensor) -> Tensor:
        """The shares of free numbers, along the last axis."""
        return x.softmax(-1)

    def inverse(self, value: Tensor) -> Tensor:
        """Free numbers that give these shares (with any constant added, they give the same).

        Raises:
            ValueError: if a share is not above 0, or they do not sum to 1.
        """
        sums = torch.isclose(value.sum(-1), torch.ones_like(value.sum(-1)), rtol=1e-4)
        _check((value > 0).all() & sums.all(), value, "positive shares that sum to 1")
        return value.log()


positive = Positive()
unit_interval = Interval()
simplex = Simplex()


def _check(holds: Tensor, value: Tensor, wanted: str) -> None:
    if not bool(holds):
        raise ValueError(f"the inverse is of values {wanted}, got {value.tolist()}")
