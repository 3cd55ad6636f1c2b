"""Conjugate gradients, for a symmetric positive definite K."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from metaopt import checks, tree
from metaopt.linsolve.base import Operator, Solution, Solver, damped, relative_residual
from metaopt.tree import Tree


@dataclass(frozen=True)
class ConjugateGradient(Solver):
    r"""Conjugate gradients for a symmetric positive definite K: exact after n steps, up to rounding.

    .. math:: x_k = \arg\min_{x \in \mathcal{K}_k(K, \alpha)} \tfrac12 x K x - \alpha x

    Hestenes & Stiefel 1952; for hypergradients Pedregosa 2016, `arXiv 1602.02355
    <https://arxiv.org/abs/1602.02355>`__, and Rajeswaran et al. 2019 (iMAML), `arXiv 1909.04630
    <https://arxiv.org/abs/1909.04630>`__.

    Cost: ``iterations`` products and one for the residual. Memory: four vectors. Error: at most
    :math:`2 ((\sqrt\kappa - 1)/(\sqrt\kappa + 1))^k` after k steps, in the norm of K. Not linear in
    ``alpha`` before it has converged.

    Args:
        iterations: the most that are taken.
        tolerance: stop at this relative residual.
        damping: added to the diagonal of K.

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 0.5 * ((w - lam) ** 2).sum(), mo.optim.SGD(lr=0.5))
    >>> problem = mo.Problem(step, lambda w, lam, _: w.sum(), torch.zeros(1), torch.ones(1), [None] * 30)
    >>> problem.hypergradient(mo.IFT(mo.linsolve.ConjugateGradient())).total  # dw*/dλ = 1
    tensor([1.])
    """

    iterations: int = 20
    tolerance: float = 1e-10
    damping: float = 0.0

    def __post_init__(self) -> None:
        checks.count(self, "iterations", self.iterations)
        checks.non_negative(self, "tolerance", self.tolerance)
        checks.non_negative(self, "damping", self.damping)

    def solve(self, operator: Operator, alpha: Tree, memory: Any = None) -> Solution:
        """The iteration from zero. The residual is measured, not the recurrence's own.

        Raises:
            ArithmeticError: if K shows a direction of negative or no curvature.
        """
        operator = damped(operator, self.damping)
        x = tree.zeros_like(alpha)
        r = alpha
        p = r
        squared = tree.dot(r, r)
        enough = self.tolerance**2 * squared
        products = 0
        while products < self.iterations and bool(squared > enough):
            product = operator(p)
            products += 1
            curvature = tree.dot(p, product)
            if not bool(curvature > 0):
                raise ArithmeticError(
                    f"ConjugateGradient: the curvature p·Kp is {float(curvature):.3g} in iteration {products}: the "
                    "inner loss has no minimum here. Train longer, add damping, or use MINRES (indefinite) or GMRES "
                    "(not symmetric)"
                )
            length = squared / curvature
            x = tree.add(x, tree.scale(length, p))
            r = tree.sub(r, tree.scale(length, product))
            previous = squared
            squared = tree.dot(r, r)
            p = tree.add(r, tree.scale(squared / previous, p))
        return Solution(x, relative_residual(operator, x, alpha), products + 1)
