"""The last K states."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from metaopt import checks
from metaopt.inner.contract import Step
from metaopt.inner.state import InnerState
from metaopt.trajectory.base import Exogenous, Moment, check_during
from metaopt.tree import Tree


class LastTape(NamedTuple):
    """The newest moments, oldest first, and how many steps the run has taken."""

    moments: tuple[Moment, ...] = ()
    steps: int = 0


@dataclass(frozen=True)
class Last:
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

    exact = True
    bounded = True

    steps: int
    graphs: bool = False

    def __post_init__(self) -> None:
        """Check the settings."""
        checks.count(self, "steps", self.steps, at_least=0)
        checks.flag(self, "graphs", self.graphs)

    def start(self, state: InnerState, lam: Tree) -> LastTape:
        """An empty tape."""
        return LastTape()

    def record(
        self, tape: LastTape, step: Step, state: InnerState, lam: Tree, batch: Any
    ) -> tuple[InnerState, LastTape]:
        """Take a step; forget the oldest."""
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

    def moments(self, tape: LastTape, step: Step, last: InnerState) -> Iterator[Moment]:
        """The remembered steps, newest first."""
        return reversed(tape.moments)

    def complete(self, tape: LastTape) -> bool:
        """Whether the run has been no longer than that."""
        return len(tape.moments) == tape.steps
