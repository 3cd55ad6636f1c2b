"""The last K states: a bounded window of the run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from typing_extensions import override

from metaopt import checks
from metaopt.inner.contract import Step
from metaopt.inner.state import InnerState
from metaopt.trajectory.base import Exogenous, Moment, Trajectory, check_during
from metaopt.tree import Tree


class LastTape(NamedTuple):
    """The newest moments, oldest first, and how many steps the run has taken."""

    moments: tuple[Moment, ...] = ()
    steps: int = 0


@dataclass(frozen=True)
class Last(Trajectory):
    """The last ``steps`` states; each with the λ it used, so λ may move between steps.

    Memory: ``steps · |s|``, however long the run is.

    Args:
        steps: K ≥ 0. With 0 nothing is remembered.
        graphs: keep each step's graph instead of rebuilding it in the sweep: saves one gradient per
            sweep step, costs K times the activations. Pays for ``steps=1``, where the graph of
            the training step itself is used.

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 0.5 * ((w - lam) ** 2).sum(), mo.optim.SGD(lr=0.5))
    >>> problem = mo.Problem(step, lambda w, lam, _: w.sum(), torch.zeros(1), torch.ones(1), [None] * 2)
    >>> problem.hypergradient(mo.RMD(mo.trajectory.Last(steps=1))).total  # the last step alone
    tensor([0.5000])
    """

    exact: ClassVar[bool] = True
    bounded: ClassVar[bool] = True

    steps: int
    graphs: bool = False

    def __post_init__(self) -> None:
        checks.count(self, "steps", self.steps, at_least=0)
        checks.flag(self, "graphs", self.graphs)

    @override
    def start(self, state: InnerState, lam: Tree) -> LastTape:
        return LastTape()

    @override
    def record(
        self, tape: LastTape, step: Step, state: InnerState, lam: Tree, batch: Any
    ) -> tuple[InnerState, LastTape]:
        if self.steps == 0:
            return step(state, lam, batch), LastTape((), tape.steps + 1)
        given = Exogenous.now(state, batch)
        if self.graphs:
            linearized = step.linearize(state, lam, batch)
            new = linearized.state
            moment = given.moment(state, lam)._replace(linearized=linearized)
        else:
            new, loss = step.evaluate(state, lam, batch)
            check_during(new.t, batch, given.versions)
            moment = given.moment(state, lam, loss)
        return new, LastTape((*tape.moments, moment)[-self.steps :], tape.steps + 1)

    @override
    def moments(self, tape: LastTape, step: Step, last: InnerState) -> Iterator[Moment]:
        return reversed(tape.moments)

    @override
    def complete(self, tape: LastTape) -> bool:
        return len(tape.moments) == tape.steps
