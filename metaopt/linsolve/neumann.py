r"""The truncated Neumann series.

.. math:: H^{-1} \approx a \sum_{j=0}^{N} (I - aH)^j

Lorraine et al. 2020, "Optimizing millions of hyperparameters by implicit differentiation", arXiv 1911.02590.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from metaopt import tree
from metaopt.linsolve.base import Operator, Solution, check_settings, ratio
from metaopt.tree import Tree


@dataclass(frozen=True)
class Neumann:
    r"""``x = Σ_{j=0}^{terms} alpha (I - K)^j`` with ``K = rate · H``.

    Cost: ``terms`` products, and one more for the mixed term afterwards. Bias: an eigenvalue :math:`\lambda_i` of H is inverted up
    to the factor :math:`1 - (1 - a\lambda_i)^{N+1}`, so the relative error is at most :math:`\max_i |1 - a\lambda_i|^{N+1}`; the series
    diverges where :math:`|1 - a\lambda_i| > 1`. Linear in ``alpha``. The residual reported is that of one term
    less (the true one would cost a product).

    Args:
        terms: N ≥ 0.
        rate: a; default: the inner learning rate, for which the sum is that of gradient descent's own :math:`A^j B`. Where it is not
            known, :class:`~metaopt.linsolve.EstimatedNeumann` finds it.
    """

    terms: int = 5
    rate: float | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.terms < 0:
            raise ValueError(f"Neumann: terms must be at least 0, got {self.terms}")
        if self.rate is not None:
            check_settings(self, positive=("rate",))

    def solve(self, operator: Operator, alpha: Tree, memory: Any = None) -> Solution:
        """The partial sum."""
        return partial_sum(operator, alpha, self.terms)


def partial_sum(operator: Operator, alpha: Tree, terms: int) -> Solution:
    """``Σ_{j=0}^{terms} alpha (I - K)^j``, with the residual of one term less, ``‖alpha (I - K)^terms‖``."""
    total = power = alpha
    for _ in range(terms):
        power = tree.sub(power, operator(power))
        total = tree.add(total, power)
    return Solution(total, ratio(tree.norm(power), tree.norm(alpha)), terms)
