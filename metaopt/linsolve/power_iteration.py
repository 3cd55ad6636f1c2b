"""Both ends of a spectrum by power iteration, and with them a rate for Neumann's series."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaopt import checks, tree
from metaopt.linsolve.base import Operator
from metaopt.tree import Tree


class Spectrum(NamedTuple):
    """Both ends of the spectrum of a symmetric K, as power iteration sees them: from inside."""

    smallest: float
    largest: float

    @property
    def rate(self) -> float:
        """The rate of Neumann's series, ``1 / largest``."""
        return 1.0 / self.largest

    def bound(self, terms: int, rate: float | None = None) -> float:
        """``max |1 - aλ|^{terms+1}`` over the spectrum: the relative error of the series.

        1 and more where it need not converge.
        """
        a = self.rate if rate is None else rate
        at_largest = abs(1.0 - a * self.largest)
        at_smallest = abs(1.0 - a * self.smallest)
        return max(at_largest, at_smallest) ** (terms + 1)


@dataclass(frozen=True)
class PowerIteration:
    r"""Estimates the spectrum of a symmetric K from products alone.

    .. math:: v \leftarrow \frac{Kv}{\|Kv\|}, \qquad \lambda \approx v \cdot K v

    Power iteration sees :math:`\lambda_{max}` from below; the rate :math:`1/\lambda_{max}`
    converges as long as it is not off by a factor of two.

    Cost: ``2 · iterations`` products. Memory: three vectors.

    Args:
        iterations: of the power method, for each end of the spectrum.
        seed: of its first vector.

    >>> found = PowerIteration().spectrum(lambda v: torch.tensor([1.0, 3.0]) * v, torch.zeros(2))
    >>> round(found.smallest, 3), round(found.largest, 3)
    (1.0, 3.0)
    """

    iterations: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        checks.count(self, "iterations", self.iterations)

    def spectrum(self, operator: Operator, like: Tree) -> Spectrum:
        """Both ends: by iteration on K, and on ``first · I - K`` with ``first`` the end found first.

        Raises:
            ArithmeticError: if K has no positive eigenvalue.
        """
        first = self._extreme(operator, like)
        second = first - self._extreme(lambda v: tree.sub(tree.scale(first, v), operator(v)), like)
        smallest = min(first, second)
        largest = max(first, second)
        if not largest > 0:
            raise ArithmeticError(
                f"PowerIteration: the largest eigenvalue of K seems to be {largest:.3g}, so that no rate makes a "
                "Neumann series converge: this is not a minimum of the inner loss (train longer, or add damping)"
            )
        return Spectrum(smallest, largest)

    def _extreme(self, operator: Operator, like: Tree) -> float:
        """The eigenvalue of largest modulus, as a Rayleigh quotient."""
        generator = torch.Generator().manual_seed(self.seed)

        def drawn(x: Any) -> Any:
            if not tree.is_float(x):
                return x
            return torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)

        v = tree.map(drawn, like)
        tiny = torch.finfo(torch.float32).tiny
        value: Tensor = torch.zeros(())
        for _ in range(self.iterations):
            length = tree.norm(v).clamp_min(tiny)
            v = tree.scale(1.0 / length, v)
            product = operator(v)
            value = tree.dot(v, product)
            v = product
        return float(value)
