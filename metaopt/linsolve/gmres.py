r"""Generalised minimum residuals, for a K of any kind.

.. math:: x_k = \arg\min_{x \in \mathcal{K}_k(K, \alpha)} \|\alpha - xK\|

Saad & Schultz 1986; for hypergradients of fixed points Blondel et al. 2022, arXiv 2105.15183.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from scipy.sparse.linalg import gmres

from metaopt.linsolve import _scipy
from metaopt.linsolve.base import Operator, Solution, Solver, check_settings, damped
from metaopt.tree import Tree


@dataclass(frozen=True)
class GMRES(Solver):
    """SciPy's ``gmres``, without restarts: for a custom Φ, whose ``I - A`` is not symmetric.

    Cost: ``iterations`` products and one for the residual. Memory: as many vectors, on the CPU in float64. Not linear in ``alpha`` before it has
    converged.

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
        return _scipy.solve(lambda A, b: gmres(A, b, rtol=self.tolerance, restart=self.iterations, maxiter=1), operator, alpha)
