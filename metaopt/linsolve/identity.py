"""The identity in place of the inverse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from metaopt import checks
from metaopt.linsolve.base import Operator, Solution, Solver, relative_residual
from metaopt.tree import Tree


@dataclass(frozen=True)
class Identity(Solver):
    r"""``x = alpha``: the Neumann series' first term.

    .. math:: H^{-1} \approx a\, I

    Luketina et al. 2016 (T1-T2), `arXiv 1511.06727 <https://arxiv.org/abs/1511.06727>`__.

    Cost: nothing but the product that measures the residual. Bias: right only where K is (close to)
    the identity. Linear in ``alpha``.

    Args:
        rate: a; 1 is T1-T2's choice, ``None`` the inner learning rate (then it is the 1-step term
            at the last weights).

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 0.5 * ((w - lam) ** 2).sum(), mo.optim.SGD(lr=0.5))
    >>> problem = mo.Problem(step, lambda w, lam, _: w.sum(), torch.zeros(1), torch.ones(1), [None] * 30)
    >>> problem.hypergradient(mo.IFT(mo.linsolve.Identity())).total  # the Hessian is the identity
    tensor([1.])
    """

    rate: float | None = 1.0

    def __post_init__(self) -> None:
        if self.rate is not None:
            checks.positive(self, "rate", self.rate)

    @property
    @override
    def descent_rate(self) -> float | None:
        return self.rate

    @override
    def solve(self, operator: Operator, alpha: Tree, memory: Any = None) -> Solution:
        return Solution(alpha, relative_residual(operator, alpha, alpha), 1)
