r"""A Neumann series whose rate is found by power iteration.

.. math:: a = \frac{1}{\lambda_{max}}, \qquad \frac{\|x - x^*\|}{\|x^*\|} \le \left(1 - \frac{\lambda_{min}}{\lambda_{max}}\right)^{N+1}

Power iteration sees :math:`\lambda_{max}` from below; this a converges as long as it is not off by a factor of two.

Lorraine et al. 2020, arXiv 1911.02590 (the series; there a is tuned by hand).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaopt import tree
from metaopt.linsolve.base import Operator, Solution, Solver, check_settings, damped
from metaopt.linsolve.neumann import partial_sum
from metaopt.tree import Tree


class Spectrum(NamedTuple):
    """Both ends of the spectrum of a symmetric K, as power iteration sees them: from inside."""

    smallest: float
    largest: float

    @property
    def rate(self) -> float:
        """``1 / largest``."""
        return 1.0 / self.largest

    def bound(self, terms: int, rate: float | None = None) -> float:
        """``max |1 - aλ|^{terms+1}`` over the spectrum: the relative error of the series; 1 and more where it need not converge."""
        a = self.rate if rate is None else rate
        return max(abs(1.0 - a * self.largest), abs(1.0 - a * self.smallest)) ** (terms + 1)


@dataclass(frozen=True)
class EstimatedNeumann(Solver):
    """``a Σ_{j=0}^{terms} alpha (I - aK)^j`` with a from the spectrum of a symmetric K.

    Cost: ``terms + 2 · iterations`` products; with a warm start ``terms``: the spectrum is remembered. Bias: :meth:`Spectrum.bound`. Linear in
    ``alpha``. For a K that is not symmetric (a custom Φ) use :class:`~metaopt.linsolve.GMRES`.

    Args:
        terms: N ≥ 0.
        iterations: of the power method, for each end of the spectrum.
        damping: added to the diagonal of K.
        seed: of the power method's first vector.
    """

    terms: int = 20
    iterations: int = 20
    damping: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the settings."""
        check_settings(self, positive=("iterations",), not_negative=("terms", "damping"))

    def solve(self, operator: Operator, alpha: Tree, memory: Any = None) -> Solution:
        """The partial sum; ``memory`` is the :class:`Spectrum`.

        Raises:
            ArithmeticError: if K has no positive eigenvalue.
        """
        operator = damped(operator, self.damping)
        known = memory if isinstance(memory, Spectrum) else self.spectrum(operator, alpha)
        found = partial_sum(lambda v: tree.scale(known.rate, operator(v)), alpha, self.terms)
        products = self.terms if known is memory else self.terms + 2 * self.iterations
        return Solution(tree.scale(known.rate, found.x), found.residual, products, known)

    def spectrum(self, operator: Operator, like: Tree) -> Spectrum:
        """Both ends of the spectrum of K, by power iteration on K and on ``first · I - K``, with ``first`` the end found first.

        Raises:
            ArithmeticError: if K has no positive eigenvalue.
        """
        first = self._extreme(operator, like)
        second = first - self._extreme(lambda v: tree.sub(tree.scale(first, v), operator(v)), like)
        smallest, largest = min(first, second), max(first, second)
        if not largest > 0:
            raise ArithmeticError(
                f"EstimatedNeumann: the largest eigenvalue of K seems to be {largest:.3g}, so that no rate makes the series converge: this is no "
                "minimum of the inner loss (train longer, or add damping)"
            )
        return Spectrum(smallest, largest)

    def _extreme(self, operator: Operator, like: Tree) -> float:
        """The eigenvalue of largest modulus, as a Rayleigh quotient."""
        generator = torch.Generator().manual_seed(self.seed)
        v = tree.map(lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device) if tree.is_float(x) else x, like)
        value: Tensor = torch.zeros(())
        for _ in range(self.iterations):
            v = tree.scale(1.0 / tree.norm(v).clamp_min(torch.finfo(torch.float32).tiny), v)
            product = operator(v)
            value, v = tree.dot(v, product), product
        return float(value)
