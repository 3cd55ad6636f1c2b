"""The 1-step method without a second derivative."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from metaopt import checks, tree
from metaopt.estimators import _noise
from metaopt.estimators._last_step import FromLastStep, Remembered
from metaopt.estimators._mixed_difference import mixed_difference
from metaopt.estimators.base import Pullback, Response, Traits
from metaopt.inner.contract import Step
from metaopt.inner.state import InnerState
from metaopt.trajectory import Moment
from metaopt.tree import Tree


@dataclass(frozen=True)
class DARTS(FromLastStep):
    r""":class:`OneStep` by finite differences.

    .. math::
        \alpha_t B_t \approx
        \frac{\nabla_\lambda L(w_{t-1} + \epsilon u) - \nabla_\lambda L(w_{t-1} - \epsilon u)}{2 \epsilon}, \qquad
        u = \alpha_t \frac{\partial w_t}{\partial g}, \quad \epsilon = r / \|u\|

    Liu et al. 2019, "DARTS: differentiable architecture search", `arXiv 1806.09055
    <https://arxiv.org/abs/1806.09055>`__, equations 7 and 8 (there ``u = -ξ α`` and ``r = 0.01``),
    for any optimiser.

    Cost per hyper-step: one gradient (for the optimiser's derivative) and two gradients with
    respect to λ. Memory: one more state, no graph of a gradient. Bias: that of 1-step, and
    :math:`O(r^2)`. Wants float32 losses that are smooth on the scale of ``radius``.

    Args:
        radius: r, the length of the step in weight space.

    Raises:
        ValueError: for a radius that is not positive.
        TypeError: for a custom step, whose loss and optimiser are not known.

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 0.5 * ((w - lam) ** 2).sum(), mo.optim.SGD(lr=0.5))
    >>> problem = mo.Problem(step, lambda w, lam, _: w.sum(), torch.zeros(1), torch.ones(1), [None] * 2)
    >>> problem.hypergradient(mo.DARTS()).total  # the loss is quadratic, so the difference is exact: one step
    tensor([0.5000])
    """

    traits: ClassVar[Traits] = Traits(
        sees="the last step", high_dimensional=True, bias="as 1-step, and a finite difference"
    )

    radius: float = 0.01

    def __post_init__(self) -> None:
        checks.positive(self, "radius", self.radius)

    @override
    def looked_at(self, taken: Moment, new: InnerState) -> Moment:
        return taken  # where the step started

    @override
    def respond(self, step: Step, state: InnerState, lam: Tree, carry: Remembered) -> tuple[Tree, Pullback]:
        """The weights, and the difference quotient."""
        at = self.last_of(carry)
        _noise.check_precision(state.w, self.radius, "DARTS: radius", "weights")

        def pullback(alpha: Tree) -> Response:
            tree.check_like(alpha, state.w, "alpha", "w")
            with at.replayed():
                u, lam_bar = step.adapt(at.state, at.lam, at.batch, alpha)
            product = mixed_difference(step, at, u, self.radius)
            return Response(product if lam_bar is None else tree.add(product, lam_bar))

        return state.w, pullback
