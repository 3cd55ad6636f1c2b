"""The forward gradient: the response along random directions of λ, rolled forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from typing_extensions import override

from metaopt import checks, replay, tree
from metaopt.estimators import _noise
from metaopt.estimators.base import Estimator, Pullback, Response, Traits
from metaopt.inner.contract import Step
from metaopt.inner.state import InnerState
from metaopt.tree import Tree


class ForwardGradientCarry(NamedTuple):
    """The directions ``v`` in λ, and the state's tangent along each."""

    directions: list[Tree]
    tangents: list[InnerState]


@dataclass(frozen=True)
class ForwardGradient(Estimator):
    r"""Unbiased hypergradients over the whole horizon in constant memory, from random directional derivatives.

    .. math::
        \dot s_t = A_t \dot s_{t-1} + B_t v, \qquad
        \alpha \frac{dw_t}{d\lambda} \approx \frac1n \sum_{i=1}^n (\alpha \cdot \dot w^{(i)}_t)\, v^{(i)},
        \qquad \mathbb{E}\, v v^\top = I

    Baydin et al. 2022, "Gradients without backpropagation", `arXiv 2202.08587
    <https://arxiv.org/abs/2202.08587>`__; Silver et al. 2021, "Learning by directional gradient
    descent" (ICLR 2022).

    Cost: ``directions`` tangents per inner step. Memory: as many states. Bias: none (online: that
    of forward mode, the Jacobians of the λ they were taken at); the variance grows with the number
    of hyperparameters and falls with ``directions``. The pullback is linear in α. Directions are
    drawn once per run.

    Args:
        directions: n ≥ 1.
        noise: ``"sign"`` (the smaller variance) or ``"gaussian"``.
        seed: of the directions.

    Raises:
        ValueError: for bad settings.

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 0.5 * ((w - lam) ** 2).sum(), mo.optim.SGD(lr=0.5))
    >>> problem = mo.Problem(step, lambda w, lam, _: w.sum(), torch.zeros(1), torch.ones(1), [None] * 2)
    >>> problem.hypergradient(mo.ForwardGradient()).total  # of one hyperparameter, it is exact
    tensor([0.7500])
    """

    traits: ClassVar[Traits] = Traits(
        sees="the whole run", high_dimensional=False, bias="none; noise grows with the size of λ"
    )

    directions: int = 1
    noise: _noise.Law = "sign"
    seed: int = 0

    def __post_init__(self) -> None:
        checks.count(self, "directions", self.directions)
        checks.one_of(self, "noise", self.noise, ("gaussian", "sign"))

    @override
    def init(self, step: Step, state: InnerState, lam: Tree) -> ForwardGradientCarry:
        generator = _noise.start(self.seed)
        directions = []
        for _ in range(self.directions):
            direction, generator = _noise.draw(lam, self.noise, generator)
            directions.append(direction)
        return ForwardGradientCarry(directions, [tree.zeros_like(state)] * self.directions)

    def advance(
        self, step: Step, state: InnerState, lam: Tree, batch: Any, carry: ForwardGradientCarry
    ) -> tuple[InnerState, ForwardGradientCarry]:
        """A step, and every tangent's."""
        rng = replay.snapshot(state)
        new = step(state, lam, batch)
        tangents = []
        with replay.preserved(state):
            for direction, tangent in zip(carry.directions, carry.tangents, strict=True):
                replay.restore(rng)
                tangents.append(step.jvp(state, lam, batch, tangent, direction))
        return new, ForwardGradientCarry(carry.directions, tangents)

    def respond(self, step: Step, state: InnerState, lam: Tree, carry: ForwardGradientCarry) -> tuple[Tree, Pullback]:
        """The weights, and the mean over directions of ``(α · ẇ) v``."""

        def pullback(alpha: Tree) -> Response:
            tree.check_like(alpha, state.w, "alpha", "w")
            total = tree.zeros_like(lam)
            for direction, tangent in zip(carry.directions, carry.tangents, strict=True):
                total = tree.add(total, tree.scale(tree.dot(alpha, tangent.w) / self.directions, direction))
            return Response(total)

        return state.w, pullback
