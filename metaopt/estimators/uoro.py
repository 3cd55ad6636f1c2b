"""UORO: an unbiased rank-one sketch of forward mode's response."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from metaopt import checks, replay, tree
from metaopt.estimators import _noise
from metaopt.estimators.base import Estimator, Pullback, Response, Traits
from metaopt.inner.contract import Step
from metaopt.inner.state import InnerState
from metaopt.tree import Tree


class UOROCarry(NamedTuple):
    """The factors of each sketch, and the noise generator's state."""

    sketches: list[tuple[InnerState, Tree]]
    generator: Tensor


@dataclass(frozen=True)
class UORO(Estimator):
    r"""Unbiased online hypergradients over the whole horizon, in memory of one state and one λ per sketch.

    .. math::
        Z_t \approx \tilde s_t\, \tilde\theta_t^\top, \quad
        \tilde s_t = \rho_0 A_t \tilde s_{t-1} + \rho_1 \nu, \quad
        \tilde\theta_t = \tilde\theta_{t-1} / \rho_0 + (\nu^\top B_t) / \rho_1, \qquad \nu \in \{-1, 1\}^{|s|}

    The cross terms have mean zero, so :math:`\mathbb{E}\, \tilde s_t \tilde\theta_t^\top = Z_t`;
    the ρ balance the norms to keep the variance low. Tallec & Ollivier 2017, "Unbiased online
    recurrent optimization", `arXiv 1702.05043 <https://arxiv.org/abs/1702.05043>`__.

    Cost: per inner step and sketch one tangent, one gradient with its graph and one product. Bias:
    none (online: that of forward mode); the variance is large and grows with the horizon's memory.
    The pullback is linear in α.

    Args:
        sketches: independent sketches to average.
        seed: of the signs.

    Raises:
        ValueError: for bad settings.
    """

    traits: ClassVar[Traits] = Traits(
        sees="the whole run", high_dimensional=False, bias="none; noise grows with the sizes of λ and T"
    )

    sketches: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        checks.count(self, "sketches", self.sketches)

    @override
    def init(self, step: Step, state: InnerState, lam: Tree) -> UOROCarry:
        return UOROCarry([(tree.zeros_like(state), tree.zeros_like(lam))] * self.sketches, _noise.start(self.seed))

    def advance(
        self, step: Step, state: InnerState, lam: Tree, batch: Any, carry: UOROCarry
    ) -> tuple[InnerState, UOROCarry]:
        """A step, and the recursion."""
        rng = replay.snapshot(state)
        new = step(state, lam, batch)
        generator = carry.generator
        sketches = []
        with replay.preserved(state):
            for s, theta in carry.sketches:
                nu, generator = _noise.draw(new, "sign", generator)
                replay.restore(rng)
                moved = step.jvp(state, lam, batch, s, tree.zeros_like(lam))
                replay.restore(rng)
                _, product = step.vjp(state, lam, batch, nu, wrt="lam")
                sketches.append(_combine(moved, theta, nu, tree.filled(product, lam)))
        return new, UOROCarry(sketches, generator)

    def respond(self, step: Step, state: InnerState, lam: Tree, carry: UOROCarry) -> tuple[Tree, Pullback]:
        """The weights, and the mean over sketches of ``(α · s̃) θ̃``."""

        def pullback(alpha: Tree) -> Response:
            tree.check_like(alpha, state.w, "alpha", "w")
            total = tree.zeros_like(lam)
            for s, theta in carry.sketches:
                total = tree.add(total, tree.scale(tree.dot(alpha, s.w) / self.sketches, theta))
            return Response(total)

        return state.w, pullback


def _combine(moved: InnerState, theta: Tree, nu: InnerState, product: Tree) -> tuple[InnerState, Tree]:
    """The new factors. A ratio of norms that is 0 or undefined stands at 1: any value is unbiased."""
    old = _balance(tree.norm(theta), tree.norm(moved))
    fresh = _balance(tree.norm(product), tree.norm(nu))
    new_s = tree.add(tree.scale(old, moved), tree.scale(fresh, nu))
    new_theta = tree.add(tree.scale(1 / old, theta), tree.scale(1 / fresh, product))
    return new_s, new_theta


def _balance(numerator: Tensor, denominator: Tensor) -> Tensor:
    ratio = (numerator / denominator).sqrt()
    return torch.where((numerator > 0) & (denominator > 0), ratio, torch.ones_like(ratio))
