"""F2SA: the bilevel problem as a penalty on the lower level's value function, by first derivatives alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from typing_extensions import override

from metaopt import checks, tree
from metaopt.estimators._last_step import AlongOneOuterLoss, Remembered
from metaopt.estimators._mixed_difference import lam_gradient
from metaopt.estimators.base import Terms, Traits
from metaopt.estimators.outer import OuterObjective
from metaopt.inner import InnerState, Step, inner_step
from metaopt.optim import SGD
from metaopt.tree import Tree


@dataclass(frozen=True)
class F2SA(AlongOneOuterLoss):
    r"""A difference of two first-order gradients, for problems whose lower level is solved along the run.

    .. math::
        \frac{dL_{val}}{d\lambda} \approx \nabla_\lambda L_{val}(y, \lambda)
          + \kappa\, \bigl(\nabla_\lambda L(y, \lambda) - \nabla_\lambda L(w, \lambda)\bigr)

    which is the gradient of :math:`L_{val}(y, \lambda) + \kappa\, (L(y, \lambda) - \min_w L(w,
    \lambda))`, with w the ordinary inner run and y a second one on :math:`L + L_{val}/\kappa`. Kwon
    et al. 2023, "A fully first-order method for stochastic bilevel optimization", `arXiv 2301.10945
    <https://arxiv.org/abs/2301.10945>`__.

    Cost per inner step: one gradient each of the inner and the outer loss; a hyper-step: two
    gradients with respect to λ. Memory: one more copy of the weights. Bias: :math:`O(1/\kappa)`
    where both runs have converged; elsewhere κ times the error of either. Sees no hyperparameter
    that enters through the optimiser alone.

    Args:
        rate: of the second run's gradient descent.
        multiplier: κ. In float32 keep it below about 1e3: the difference loses that many digits.

    Raises:
        ValueError: for settings that are not positive.
        TypeError: for a custom step, whose loss is not known.
    """

    traits: ClassVar[Traits] = Traits(sees="a solution", high_dimensional=True, bias="of order 1/κ at a solution")

    sees_optimizer = False

    rate: float = 0.01
    multiplier: float = 100.0

    def __post_init__(self) -> None:
        checks.positive(self, "rate", self.rate)
        checks.positive(self, "multiplier", self.multiplier)

    @override
    def start_of(self, state: InnerState, lam: Tree) -> Tree:
        return state.w  # y: both runs start at the same weights

    @override
    def observe(self, step: Step, outer: OuterObjective, state: InnerState, lam: Tree, carry: Remembered) -> Remembered:
        """A step of the second run, on the same batch."""
        at = self.last_of(carry)

        def penalised(y: Tree, lam: Tree, batch: Any) -> Any:
            return step.loss(y, lam, batch) + outer.loss(y, lam, outer.batch) / self.multiplier

        with at.replayed():
            y = inner_step(penalised, SGD(lr=self.rate))(InnerState(carry.own), lam, at.batch).w
        return carry._replace(own=y)

    @override
    def differentiate(
        self, step: Step, outer: OuterObjective, state: InnerState, lam: Tree, carry: Remembered
    ) -> Terms:
        """The direct term at y, and κ times the difference; the outer loss reported is the one at y."""
        at = self.last_of(carry)._replace(lam=lam)
        loss, _, direct = outer.gradient(carry.own, lam)
        at_y = lam_gradient(step, at.moved(carry.own))
        at_w = lam_gradient(step, at)
        difference = tree.map(lambda a, b: None if a is None or b is None else self.multiplier * (a - b), at_y, at_w)
        return Terms(loss, direct, difference)
