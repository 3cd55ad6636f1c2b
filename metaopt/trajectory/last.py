"""The last K states."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from metaopt import replay
from metaopt.inner.contract import Step
from metaopt.inner.state import InnerState
from metaopt.trajectory.base import Moment
from metaopt.tree import Tree


class LastTape(NamedTuple):
    """The newest moments, oldest first, and how many steps the run has taken."""

    moments: tuple[Moment, ...] = ()
    steps: int = 0


@dataclass(frozen=True)
class Last:
    """The last ``horizon`` states; each with the λ it used, so λ may move between steps.

    Memory: ``horizon · |s|``, however long the run is.

    Args:
        horizon: K ≥ 0. With 0 nothing is remembered.
        graphs: keep each step's graph instead of rebuilding it in the sweep: saves one gradient per
            sweep step, costs K times the activations. Pays for ``horizon=1``, where the graph of
            the training step itself is used.
    """

    horizon: int
    graphs: bool = False

    def __post_init__(self) -> None:
        """Check the horizon."""
        if self.horizon < 0:
            raise ValueError(f"horizon must be at least 0, got {self.horizon}")

    @property
    def exact(self) -> bool:
        """Yes, as far back as it goes."""
        return True

    @property
    def bounded(self) -> bool:
        """Yes."""
        return True

    def start(self, state: InnerState, lam: Tree) -> LastTape:
        """An empty tape."""
        return LastTape()

    def record(
        self, tape: LastTape, step: Step, state: InnerState, lam: Tree, batch: Any
    ) -> tuple[InnerState, LastTape]:
        """Take a step; forget the oldest."""
        if self.horizon == 0:
            return step(state, lam, batch), LastTape((), tape.steps + 1)
        rng = replay.snapshot(state)
        linearized = step.linearize(state, lam, batch) if self.graphs else None
        new = step(state, lam, batch) if linearized is None else linearized.state
        moment = Moment(state, lam, batch, rng, linearized)
        return new, LastTape((*tape.moments, moment)[-self.horizon :], tape.steps + 1)

    def moments(self, tape: LastTape, step: Step, last: InnerState) -> Iterator[Moment]:
        """The remembered steps, newest first."""
        return reversed(tape.moments)

    def complete(self, tape: LastTape) -> bool:
        """Whether the run has been no longer than the horizon."""
        return len(tape.moments) == tape.steps
