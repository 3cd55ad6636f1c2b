r"""Implicit differentiation at the state reached.

.. math::
    \frac{dw^*}{d\lambda} = (I - A)^{-1} B, \qquad\text{with gradient descent's } A, B:\quad
    -\alpha H^{-1} \frac{\partial^2 L}{\partial w\, \partial \lambda}

Lorraine et al. 2020, arXiv 1911.02590 (Neumann series); Pedregosa 2016, arXiv 1602.02355.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from metaopt import tree
from metaopt.estimators.base import Estimator, Pullback, Response
from metaopt.inner.state import InnerState
from metaopt.inner.step import Step
from metaopt.linsolve import Neumann, Solver
from metaopt.trajectory import replay
from metaopt.trajectory.replay import Rng
from metaopt.tree import Tree


class LastBatch(NamedTuple):
    """The batch of the last step, and the random state before it."""

    batch: Any = None
    rng: Rng | None = None


@dataclass(frozen=True)
class IFT(Estimator):
    """``α (I - A)^{-1} B`` at the last weights and the last batch, by a linear solver.

    ``A`` and ``B`` are those of gradient descent on the inner loss, whatever optimiser ran (a custom Φ is taken as its own fixed-point
    map), so the optimiser's memory plays no part. Cost: one gradient, the solver's products and one more. Memory: one graph. Bias: right
    only at a stationary point of the inner loss; elsewhere it answers another question. May be used online near convergence.

    Hyperparameters that enter through the optimiser alone (learning rates) do not move the solution: they count as unused.

    Args:
        solver: from :mod:`metaopt.linsolve`.
    """

    solver: Solver = Neumann()

    def init(self, step: Step, state: InnerState, lam: Tree) -> LastBatch:
        """Nothing yet."""
        return LastBatch()

    def advance(self, step: Step, state: InnerState, lam: Tree, batch: Any, carry: LastBatch) -> tuple[InnerState, LastBatch]:
        """A plain step; its batch is kept."""
        rng = replay.snapshot(state)
        return step(state, lam, batch), LastBatch(batch, rng)

    def respond(self, step: Step, state: InnerState, lam: Tree, carry: LastBatch) -> tuple[Tree, Pullback]:
        """The weights, and the implicit pullback."""
        batch, rng = carry
        if rng is None:
            raise ValueError("IFT has seen no inner step yet: it needs the batch of the last one")

        def pullback(alpha: Tree) -> Response:
            tree.check_like(alpha, state.w, "alpha", "w")
            fixed_point, seen = step.stationary(state, self.solver.rate)
            with replay.preserved(state):
                replay.restore(rng)
                linearized = fixed_point.linearize(seen, lam, batch)

            def operator(v: InnerState) -> InnerState:
                product, _ = linearized.pullback(v, "state")
                return tree.sub(v, product)

            cotangent = InnerState(alpha, tree.zeros_like(seen.slots), seen.t)
            solution = self.solver.solve(operator, cotangent)
            return Response(linearized.pullback(solution, "lam")[1])

        return state.w, pullback
