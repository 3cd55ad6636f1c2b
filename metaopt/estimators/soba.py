"""SOBA: weights, linear system and λ all move together, one step each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from metaopt import checks, tree
from metaopt.estimators._last_step import AlongOneOuterLoss, Remembered
from metaopt.estimators.base import Terms, Traits
from metaopt.estimators.outer import OuterObjective
from metaopt.inner.contract import Step, Wrt
from metaopt.inner.state import InnerState
from metaopt.tree import Tree


@dataclass(frozen=True)
class SOBA(AlongOneOuterLoss):
    r"""Single-loop bilevel optimisation: one product of the linear system per inner step, warm-started.

    .. math::
        v_t = v_{t-1} - \rho\, (\nabla^2_{ww} L\, v_{t-1} + \nabla_w L_{val}), \qquad
        \frac{dL_{val}}{d\lambda} \approx
        \partial_\lambda L_{val} + v_t\, \frac{\partial^2 L}{\partial w\, \partial\lambda}

    at the weights after step t and its batch, so that :math:`v_t` follows :math:`-H^{-1} \nabla_w
    L_{val}`. Dagréou et al. 2022, "A framework for bilevel optimization that enables stochastic and
    global variance reduction algorithms", `arXiv 2201.13409 <https://arxiv.org/abs/2201.13409>`__
    (there the three moves are simultaneous; here in this order).

    Cost per inner step: one outer gradient, one gradient with its graph and one product; a
    hyper-step as much again. Memory: one vector like the weights, one graph. Bias: that of v, which
    vanishes as the run and λ settle; needs ``ρ`` below 2 over H's largest eigenvalue. Sees no
    hyperparameter that enters through the optimiser alone.

    Args:
        rate: ρ.

    Raises:
        ValueError: for a rate that is not positive, or a custom step (it has no Hessian).

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 0.5 * ((w - lam) ** 2).sum(), mo.optim.SGD(lr=0.5))
    >>> problem = mo.Problem(step, lambda w, lam, _: w.sum(), torch.zeros(1), torch.ones(1), [None] * 30)
    >>> problem.hypergradient(mo.SOBA(rate=0.01)).total  # 1 - 0.99³⁰: the linear system is still being solved
    tensor([0.2603])
    """

    traits: ClassVar[Traits] = Traits(
        sees="a solution", high_dimensional=True, bias="until the run and its linear system have settled"
    )

    sees_optimizer = False

    rate: float = 0.01

    def __post_init__(self) -> None:
        checks.positive(self, "rate", self.rate)

    @override
    def start_of(self, state: InnerState, lam: Tree) -> Tree:
        return tree.zeros_like(state.w)  # v

    @override
    def observe(self, step: Step, outer: OuterObjective, state: InnerState, lam: Tree, carry: Remembered) -> Remembered:
        """One step of the linear system."""
        _, alpha, _ = outer.gradient(state.w, lam)
        contracted, _ = self._products(step, lam, carry, "state")
        assert contracted is not None
        return carry._replace(own=tree.sub(contracted.w, tree.scale(self.rate, alpha)))

    @override
    def differentiate(
        self, step: Step, outer: OuterObjective, state: InnerState, lam: Tree, carry: Remembered
    ) -> Terms:
        """The direct term, and ``v`` times the mixed derivative."""
        loss, _, direct = outer.gradient(state.w, lam)
        _, product = self._products(step, lam, carry, "lam")
        return Terms(loss, direct, tree.scale(-1.0 / self.rate, product))

    def _products(self, step: Step, lam: Tree, carry: Remembered, wrt: Wrt) -> tuple[InnerState | None, Tree]:
        """``(v - ρHv, -ρ v ∂²L/∂w∂λ)``: gradient descent's own adjoint."""
        at = self.last_of(carry)
        descent, seen, *_ = step.stationary(at.state, self.rate)
        with at.replayed():
            return descent.linearize(seen, lam, at.batch).pullback(InnerState(carry.own, None, seen.t), wrt)
