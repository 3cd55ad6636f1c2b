r"""The 1-step method without a second derivative.

.. math::
    \alpha_t B_t \approx \frac{\nabla_\lambda L(w_{t-1} + \epsilon u) - \nabla_\lambda L(w_{t-1} - \epsilon u)}{2 \epsilon}, \qquad
    u = \alpha_t \frac{\partial w_t}{\partial g}, \quad \epsilon = r / \|u\|

Liu et al. 2019, "DARTS: differentiable architecture search", arXiv 1806.09055, equations 7 and 8
(there ``u = -ξ α`` and ``r = 0.01``), for any optimiser.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from metaopt import replay, tree
from metaopt.estimators import _noise
from metaopt.estimators._mixed_difference import mixed_difference
from metaopt.estimators.base import Estimator, Pullback, Response, Traits
from metaopt.inner.contract import Step
from metaopt.inner.state import InnerState
from metaopt.replay import Rng
from metaopt.tree import Tree


class LastStep(NamedTuple):
    """Where the last step started, its λ, its batch, and the random state before it."""

    state: InnerState
    lam: Tree
    batch: Any = None
    rng: Rng | None = None


@dataclass(frozen=True)
class DARTS(Estimator):
    """:class:`OneStep` by finite differences.

    Cost per hyper-step: one gradient (for the optimiser's derivative) and two gradients with
    respect to λ. Memory: one more state, no graph of a gradient. Bias: that of 1-step, and
    :math:`O(r^2)`. Wants float32 losses that are smooth on the scale of ``radius``.

    Args:
        radius: r, the length of the step in weight space.

    Raises:
        ValueError: for a radius that is not positive.
        TypeError: for a custom step, whose loss and optimiser are not known.
    """

    traits: ClassVar[Traits] = Traits(
        sees="the last step", high_dimensional=True, bias="as 1-step, and a finite difference"
    )

    radius: float = 0.01

    def __post_init__(self) -> None:
        """Check the radius."""
        _noise.check_positive(self.radius, "DARTS: radius")

    def init(self, step: Step, state: InnerState, lam: Tree) -> LastStep:
        """Nothing yet."""
        return LastStep(state, lam)

    def advance(
        self, step: Step, state: InnerState, lam: Tree, batch: Any, carry: LastStep
    ) -> tuple[InnerState, LastStep]:
        """A plain step; where it started is kept."""
        rng = replay.snapshot(state)
        return step(state, lam, batch), LastStep(state, lam, batch, rng)

    def respond(self, step: Step, state: InnerState, lam: Tree, carry: LastStep) -> tuple[Tree, Pullback]:
        """The weights, and the difference quotient."""
        before, lam_then, batch, rng = carry
        if rng is None:
            raise ValueError("DARTS has seen no inner step yet")

        def pullback(alpha: Tree) -> Response:
            tree.check_like(alpha, state.w, "alpha", "w")
            with replay.preserved(state):
                replay.restore(rng)
                u, lam_bar = step.adapt(before, lam_then, batch, alpha)
            product = mixed_difference(step, before.w, lam_then, batch, rng, u, self.radius)
            return Response(product if lam_bar is None else tree.add(product, lam_bar))

        return state.w, pullback
