"""SAMA: implicit differentiation with the optimiser's own derivative for the inverse Hessian."""

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
from metaopt.tree import Tree


@dataclass(frozen=True)
class SAMA(FromLastStep):
    r"""One finite difference along the preconditioned cotangent, at the last weights.

    .. math::
        \frac{dL_{val}}{d\lambda} \approx \partial_\lambda L_{val}
          - \frac{\nabla_\lambda L(w_t + \epsilon v) - \nabla_\lambda L(w_t - \epsilon
          v)}{2\epsilon}, \qquad
        v = \frac{\partial u}{\partial g}\, \alpha_t, \quad \epsilon = r / \|v\|

    with :math:`u(g)` the optimiser's update, :math:`w_{t+1} = w_t - u(g)`. Choe et al. 2023,
    "Making scalable meta learning practical", `arXiv 2310.05674
    <https://arxiv.org/abs/2310.05674>`__. (Its extra push of the base weights along v is a change
    of the inner run, not of the hypergradient, and is not made here.)

    Cost per hyper-step: one gradient and two gradients with respect to λ. Memory: nothing but the
    batch. Bias: the inverse Hessian is replaced by (the diagonal of) the update's derivative, so
    the direction is right only where those are proportional; like every implicit method it does not
    see hyperparameters that enter through the optimiser alone.

    Args:
        radius: r, the length of the step in weight space.

    Raises:
        ValueError: for a radius that is not positive.
        TypeError: for a custom step, whose loss and optimiser are not known.

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 0.5 * ((w - lam) ** 2).sum(), mo.optim.SGD(lr=0.5))
    >>> problem = mo.Problem(step, lambda w, lam, _: w.sum(), torch.zeros(1), torch.ones(1), [None] * 2)
    >>> problem.hypergradient(mo.SAMA()).total  # the rate, times the identity for the inverse Hessian
    tensor([0.5000])
    """

    traits: ClassVar[Traits] = Traits(
        sees="a solution", high_dimensional=True, bias="a diagonal for the inverse Hessian; a finite difference"
    )

    sees_optimizer = False

    radius: float = 0.01

    def __post_init__(self) -> None:
        checks.positive(self, "radius", self.radius)

    @override
    def respond(self, step: Step, state: InnerState, lam: Tree, carry: Remembered) -> tuple[Tree, Pullback]:
        """The weights, and the difference quotient."""
        at = self.last_of(carry)._replace(lam=lam)
        _noise.check_precision(state.w, self.radius, "SAMA: radius", "weights")

        def pullback(alpha: Tree) -> Response:
            tree.check_like(alpha, state.w, "alpha", "w")
            with at.replayed():
                u, _ = step.adapt(at.state, lam, at.batch, alpha)  # u = -v
            return Response(mixed_difference(step, at, u, self.radius))

        return state.w, pullback
