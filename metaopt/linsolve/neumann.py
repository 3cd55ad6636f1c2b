"""The Neumann series, cut off after some terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from metaopt import checks, tree
from metaopt.linsolve.base import Operator, Solution, Solver, damped, ratio
from metaopt.linsolve.power_iteration import PowerIteration, Spectrum
from metaopt.tree import Tree


@dataclass(frozen=True)
class Neumann(Solver):
    r"""``x = Σ_{j=0}^{terms} alpha (I - K)^j`` with ``K = rate · (H + damping · I)``.

    .. math:: H^{-1} \approx a \sum_{j=0}^{N} (I - aH)^j

    Lorraine et al. 2020, "Optimizing millions of hyperparameters by implicit differentiation",
    `arXiv 1911.02590 <https://arxiv.org/abs/1911.02590>`__.

    Cost: ``terms`` products, and one more for the mixed term afterwards. Estimating the rate takes
    products too, once: a warm start remembers the spectrum. Memory: three vectors.

    Bias: an eigenvalue :math:`\lambda_i` of H is inverted up to the factor :math:`1 - (1 -
    a\lambda_i)^{N+1}`. So the relative error is at most :math:`\max_i |1 - a\lambda_i|^{N+1}`
    (:meth:`~metaopt.linsolve.Spectrum.bound`, of the solution's ``memory``), and the series
    diverges where :math:`|1 - a\lambda_i| > 1`. Linear in ``alpha``. The residual that is reported
    belongs to one term less, since the true one would cost a product.

    Args:
        terms: N ≥ 0.
        rate: a; default: the inner learning rate, for which the sum is that of gradient descent's
            own :math:`A^j B`. ``PowerIteration()`` estimates :math:`1/\lambda_{max}` of a symmetric
            K (a custom Φ need not have one: use GMRES).
        damping: added to the diagonal of H; needs a ``rate``.

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 0.5 * ((w - lam) ** 2).sum(), mo.optim.SGD(lr=0.5))
    >>> problem = mo.Problem(step, lambda w, lam, _: w.sum(), torch.zeros(1), torch.ones(1), [None] * 30)
    >>> problem.hypergradient(mo.IFT(mo.linsolve.Neumann(terms=9))).total  # dw*/dλ = 1, up to 1 - 0.5¹⁰
    tensor([0.9990])
    """

    terms: int = 5
    rate: float | PowerIteration | None = None
    damping: float = 0.0

    def __post_init__(self) -> None:
        checks.count(self, "terms", self.terms, at_least=0)
        checks.non_negative(self, "damping", self.damping)
        if isinstance(self.rate, (int, float)):
            checks.positive(self, "rate", self.rate)
        if self.rate is None and self.damping > 0:
            raise ValueError("Neumann: damping needs a rate, which scales it: give one, or rate=PowerIteration()")

    @property
    def descent_rate(self) -> float | None:
        """The rate of the series; where it is estimated, 1, so that the operator is H itself."""
        return 1.0 if isinstance(self.rate, PowerIteration) else self.rate

    def solve(self, operator: Operator, alpha: Tree, memory: Any = None) -> Solution:
        """The partial sum; ``memory`` is the :class:`~metaopt.linsolve.Spectrum`, where the rate is estimated.

        Raises:
            ArithmeticError: if the rate is to be estimated, and K has no positive eigenvalue.
        """
        if not isinstance(self.rate, PowerIteration):
            scaled = self.damping * (self.rate or 0.0)
            return self._sum(damped(operator, scaled), alpha)
        operator = damped(operator, self.damping)
        known = memory if isinstance(memory, Spectrum) else self.rate.spectrum(operator, alpha)
        found = self._sum(lambda v: tree.scale(known.rate, operator(v)), alpha)
        estimated = 0 if known is memory else 2 * self.rate.iterations
        return Solution(tree.scale(known.rate, found.x), found.residual, found.products + estimated, known)

    def _sum(self, operator: Operator, alpha: Tree) -> Solution:
        """The series itself, with the residual of one term less, ``‖alpha (I - K)^terms‖ / ‖alpha‖``."""
        total = power = alpha
        for _ in range(self.terms):
            power = tree.sub(power, operator(power))
            total = tree.add(total, power)
        return Solution(total, ratio(tree.norm(power), tree.norm(alpha)), self.terms)
