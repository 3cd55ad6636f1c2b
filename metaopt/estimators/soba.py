r"""SOBA: weights, linear system and λ all move together, one step each.

.. math::
    v_t = v_{t-1} - \rho\, (\nabla^2_{ww} L\, v_{t-1} + \nabla_w L_{val}), \qquad
    \frac{dL_{val}}{d\lambda} \approx \partial_\lambda L_{val} + v_t\, \frac{\partial^2 L}{\partial w\, \partial\lambda}

at the weights after step t and its batch, so that :math:`v_t` follows :math:`-H^{-1} \nabla_w
L_{val}`. Dagréou et al. 2022, "A framework for bilevel optimization that enables stochastic and
global variance reduction algorithms", arXiv 2201.13409 (there the three moves are simultaneous;
here in this order).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from metaopt import replay, tree
from metaopt.estimators import _noise
from metaopt.estimators.base import Estimator, Pullback, Terms, Traits
from metaopt.estimators.implicit import LastBatch
from metaopt.estimators.outer import OuterObjective, outer_gradient
from metaopt.inner.contract import Step
from metaopt.inner.state import InnerState
from metaopt.tree import Tree


class SOBACarry(NamedTuple):
    """The running solution v, and the last batch."""

    v: Tree
    last: LastBatch


@dataclass(frozen=True)
class SOBA(Estimator):
    """Single-loop bilevel optimisation: one product of the linear system per inner step, warm-started by all before it.

    Cost per inner step: one outer gradient, one gradient with its graph and one product; a
    hyper-step as much again. Memory: one vector like the weights, one graph. Bias: that of v, which
    vanishes as the run and λ settle; needs ``ρ`` below 2 over H's largest eigenvalue. Sees no
    hyperparameter that enters through the optimiser alone.

    Args:
        rate: ρ.

    Raises:
        ValueError: for a rate that is not positive, or a custom step (it has no Hessian).
    """

    traits: ClassVar[Traits] = Traits(
        sees="a solution", high_dimensional=True, bias="until the run and its linear system have settled"
    )

    rate: float = 0.01

    def __post_init__(self) -> None:
        """Check the rate."""
        _noise.check_positive(self.rate, "SOBA: rate")

    @property
    def needs_outer_loss(self) -> bool:
        """Yes: v follows its gradient."""
        return True

    def init(self, step: Step, state: InnerState, lam: Tree) -> SOBACarry:
        """``v_0 = 0``."""
        return SOBACarry(tree.zeros_like(state.w), LastBatch())

    def advance(
        self, step: Step, state: InnerState, lam: Tree, batch: Any, carry: SOBACarry
    ) -> tuple[InnerState, SOBACarry]:
        """A plain step; its batch is kept."""
        rng = replay.snapshot(state)
        return step(state, lam, batch), carry._replace(last=LastBatch(batch, rng))

    def observe(self, step: Step, outer: OuterObjective, state: InnerState, lam: Tree, carry: SOBACarry) -> SOBACarry:
        """One step of the linear system."""
        _, alpha, _ = outer_gradient(outer.loss, state.w, lam, outer.batch)
        contracted, _ = self._products(step, state, lam, carry, "state")
        return carry._replace(v=tree.sub(contracted.w, tree.scale(self.rate, alpha)))

    def respond(self, step: Step, state: InnerState, lam: Tree, carry: SOBACarry) -> tuple[Tree, Pullback]:
        """None.

        Raises:
            TypeError: always; v belongs to one outer loss.
        """
        raise TypeError(
            "SOBA follows one outer loss along the run and has no pullback for another: use mo.hypergradient or "
            "mo.online"
        )

    def differentiate(self, step: Step, outer: OuterObjective, state: InnerState, lam: Tree, carry: SOBACarry) -> Terms:
        """The direct term, and ``v`` times the mixed derivative."""
        loss, _, direct = outer_gradient(outer.loss, state.w, lam, outer.batch)
        _, product = self._products(step, state, lam, carry, "lam")
        return Terms(loss, direct, tree.scale(-1.0 / self.rate, product))

    def _products(self, step: Step, state: InnerState, lam: Tree, carry: SOBACarry, wrt: Any) -> tuple[Any, Tree]:
        """``(v - ρHv, -ρ v ∂²L/∂w∂λ)``: gradient descent's own adjoint."""
        if carry.last.rng is None:
            raise ValueError("SOBA has seen no inner step yet")
        descent, seen, _ = step.stationary(state, self.rate)
        with replay.preserved(state):
            replay.restore(carry.last.rng)
            return descent.linearize(seen, lam, carry.last.batch).pullback(InnerState(carry.v, None, seen.t), wrt)
