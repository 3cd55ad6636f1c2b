"""First-order: the direct term only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from typing_extensions import override

from metaopt import tree
from metaopt.estimators.base import Estimator, Pullback, Response, Traits
from metaopt.inner.contract import Step
from metaopt.inner.state import InnerState
from metaopt.tree import Tree


@dataclass(frozen=True)
class FirstOrder(Estimator):
    """``dL_val/dλ ≈ ∂L_val/∂λ``: the pullback is 0.

    Cost: no product. Memory: nothing. Bias: the whole indirect term is dropped; where the outer
    loss does not see λ (learning rates, data weights), the result is zero.

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 0.5 * ((w - lam) ** 2).sum(), mo.optim.SGD(lr=0.5))
    >>> problem = mo.Problem(step, lambda w, lam, _: (w * lam).sum(), torch.zeros(1), torch.ones(1), [None] * 2)
    >>> problem.hypergradient(mo.FirstOrder()).total  # w itself, 0.75, at fixed weights
    tensor([0.7500])
    """

    traits: ClassVar[Traits] = Traits(sees="nothing", high_dimensional=True, bias="the whole indirect term")
    gives_initial = True
    drops_indirect = True

    @override
    def init(self, step: Step, state: InnerState, lam: Tree) -> None:
        return None

    @override
    def advance(self, step: Step, state: InnerState, lam: Tree, batch: Any, carry: Any) -> tuple[InnerState, None]:
        return step(state, lam, batch), None

    def respond(self, step: Step, state: InnerState, lam: Tree, carry: Any) -> tuple[Tree, Pullback]:
        """The weights, and the zero map; the initial weights get α itself, which is first-order MAML."""
        return state.w, lambda alpha: Response(tree.zeros_like(lam), InnerState(alpha, None, state.t))
