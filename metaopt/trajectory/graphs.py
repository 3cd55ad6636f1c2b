"""The graph of every step is kept: no step is evaluated twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from metaopt import replay
from metaopt.inner.contract import Step
from metaopt.inner.state import InnerState
from metaopt.trajectory.base import Moment, check_fixed
from metaopt.trajectory.full import Full, FullTape
from metaopt.tree import Tree


@dataclass(frozen=True)
class Graphs(Full):
    """The graph of every step's gradient, swept step by step: nothing is recomputed.

    Cost: none in the sweep but the products. Memory: T times the activations; the fastest where it
    fits, and never more than backpropagation through the whole run. :class:`Budgeted` keeps as many
    graphs as a number of bytes allows.

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 0.5 * ((w - lam) ** 2).sum(), mo.optim.SGD(lr=0.5))
    >>> problem = mo.Problem(step, lambda w, lam, _: w.sum(), torch.zeros(1), torch.ones(1), [None] * 2)
    >>> problem.hypergradient(mo.RMD(mo.trajectory.Graphs())).total  # exact: 1 - (1 - 0.5)²
    tensor([0.7500])
    """

    @override
    def record(
        self, tape: FullTape, step: Step, state: InnerState, lam: Tree, batch: Any
    ) -> tuple[InnerState, FullTape]:
        check_fixed(lam, tape.lam, tape.versions, "a trajectory of graphs")
        rng = replay.snapshot(state)
        linearized = step.linearize(state, lam, batch)
        tape.moments.append(Moment(state, lam, batch, rng, linearized))
        return linearized.state, tape
