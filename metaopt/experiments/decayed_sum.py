r"""Equation 7 of the HyperDistill paper: the indirect term with every Jacobian A replaced by a number γ.

.. math:: g^{SO}_t \approx \sum_{i=1}^{t} \gamma^{t-i}\, \alpha_t B_i

It is what HyperDistill distils, before any distillation: products at all t states instead of one at
their average. Only its direction is of interest (figure 3b). Lee et al. 2022, `arXiv 2110.02508
<https://arxiv.org/abs/2110.02508>`__.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from metaopt import replay, tree
from metaopt.estimators import Estimator, Response
from metaopt.estimators.base import Pullback
from metaopt.inner import InnerState, Step
from metaopt.trajectory import Full
from metaopt.tree import Tree


@dataclass(frozen=True)
class DecayedSum(Estimator):
    """``Σ γ^{t-i} α_t B_i``. Cost: t products and t gradients per answer. Memory: all states. Bias.

    A is not a number. Offline.

    Args:
        gamma: γ in [0, 1]; 0 is the 1-step method.
    """

    gamma: float

    online = False  # the states belong to one λ

    @override
    def init(self, step: Step, state: InnerState, lam: Tree) -> Any:
        return Full().start(state, lam)

    @override
    def advance(self, step: Step, state: InnerState, lam: Tree, batch: Any, carry: Any) -> tuple[InnerState, Any]:
        return Full().record(carry, step, state, lam, batch)

    def respond(self, step: Step, state: InnerState, lam: Tree, carry: Any) -> tuple[Tree, Pullback]:
        """The weights, and the sum."""

        def pullback(alpha: Tree) -> Response:
            total = tree.map(lambda _: None, lam)
            weight = 1.0
            with replay.preserved(state):
                for moment in Full().moments(carry, step, state):
                    _, product = moment.pullback(step, InnerState(alpha, None, state.t), "lam")
                    total = tree.add(total, tree.scale(weight, product))
                    weight *= self.gamma
            return Response(total)

        return state.w, pullback
