r"""Minimum residuals for a symmetric, possibly indefinite K.

.. math:: x_k = \arg\min_{x \in \mathcal{K}_k(K, \alpha)} \|\alpha - xK\|

Paige & Saunders 1975.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from scipy.sparse.linalg import minres

from metaopt.linsolve import _scipy
from metaopt.linsolve.base import Operator, Solution, Solver, check_settings, damped
from metaopt.tree import Tree


@dataclass(frozen=True)
class MINRES(Solver):
    """SciPy's ``minres``: where the inner loss has directions of negative or no curvature.

    Cost: ``iterations`` products and one for the residual. Memory: a handful of vectors, which visit the CPU in float64. Not linear in
    ``alpha`` before it has converged.

    Args:
        iterations: at most so many.
        tolerance: SciPy's ``rtol``.
        damping: added to the diagonal of K.
    """

    iterations: int = 50
    tolerance: float = 1e-10
    damping: float = 0.0

    def __post_init__(self) -> None:
        """Check the settings."""
        check_settings(self, positive=("iterations",), not_negative=("tolerance", "damping"))

    def solve(self, operator: Operator, alpha: Tree, memory: Any = None) -> Solution:
        """From zero."""
        operator = damped(operator, self.damping)
        return _scipy.solve(lambda A, b: minres(A, b, rtol=self.tolerance, maxiter=self.iterations), operator, alpha)
