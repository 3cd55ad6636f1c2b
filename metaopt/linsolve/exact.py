"""A dense solve, for small problems."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from metaopt import checks, tree
from metaopt.linsolve.base import Operator, Solution, Solver, relative_residual
from metaopt.tree import Tree


@dataclass(frozen=True)
class Exact(Solver):
    r"""K row by row, then a factorisation: for small problems and for checking the others.

    .. math:: x = \alpha\, (K + \rho I)^{-1}

    Cost: n products and ``n³``. Memory: n². Linear in ``alpha``.

    Args:
        damping: ρ, added to the diagonal.
        limit: largest n.

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 0.5 * ((w - lam) ** 2).sum(), mo.optim.SGD(lr=0.5))
    >>> problem = mo.Problem(step, lambda w, lam, _: w.sum(), torch.zeros(1), torch.ones(1), [None] * 30)
    >>> problem.hypergradient(mo.IFT(mo.linsolve.Exact())).total  # dw*/dλ = 1
    tensor([1.])
    """

    damping: float = 0.0
    limit: int = 5_000

    def __post_init__(self) -> None:
        checks.count(self, "limit", self.limit)
        checks.non_negative(self, "damping", self.damping)

    def solve(self, operator: Operator, alpha: Tree, memory: Any = None) -> Solution:
        """Build K row by row, and solve.

        Raises:
            ValueError: if there are more than ``limit`` weights.
            ArithmeticError: if the matrix is singular.
        """
        n = tree.vector(alpha).numel()
        if n > self.limit:
            raise ValueError(
                f"Exact: {n:,} weights are more than limit={self.limit:,}; use ConjugateGradient, Neumann or Nystrom"
            )
        unit = torch.eye(n, dtype=tree.vector(alpha).dtype, device=tree.vector(alpha).device)
        K = torch.stack([tree.vector(operator(tree.unvector(row, alpha))) for row in unit]) + self.damping * unit
        try:
            x = torch.linalg.solve(K.T, tree.vector(alpha))
        except RuntimeError as error:
            raise ArithmeticError(
                "Exact: the matrix is singular (a flat direction of the inner loss): add damping, or use MINRES"
            ) from error
        found = tree.unvector(x, alpha)
        return Solution(found, relative_residual(lambda v: tree.unvector(tree.vector(v) @ K, v), found, alpha), n)
