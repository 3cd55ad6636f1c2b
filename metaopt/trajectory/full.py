"""Every state of the run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from typing_extensions import override

from metaopt import replay
from metaopt.inner.contract import Step
from metaopt.inner.state import InnerState
from metaopt.trajectory._rows import Rows
from metaopt.trajectory.base import Exogenous, Moment, Trajectory, check_during, check_fixed
from metaopt.tree import Tree


class FullTape(NamedTuple):
    """λ as it was at the start (to notice if it moves), one moment per step, and where their states are."""

    lam: Tree
    versions: tuple[int, ...]
    moments: list[Moment]
    rows: Rows


@dataclass(frozen=True)
class Full(Trajectory):
    """States ``s_0 … s_{T-1}``, batches and random states; graphs are rebuilt one at a time in the sweep.

    Cost: no extra work while running; one gradient per step in the sweep. Memory: ``T · |s|``,
    independent of activations; states of 64 KiB and more are copied into preallocated rows
    (:mod:`metaopt.trajectory._rows`).

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 0.5 * ((w - lam) ** 2).sum(), mo.optim.SGD(lr=0.5))
    >>> problem = mo.Problem(step, lambda w, lam, _: w.sum(), torch.zeros(1), torch.ones(1), [None] * 2)
    >>> problem.hypergradient(mo.RMD(mo.trajectory.Full())).total  # exact: 1 - (1 - 0.5)²
    tensor([0.7500])
    """

    exact: ClassVar[bool] = True
    bounded: ClassVar[bool] = False

    @override
    def start(self, state: InnerState, lam: Tree) -> FullTape:
        return FullTape(lam, replay.versions_of(lam), [], Rows())

    @override
    def record(
        self, tape: FullTape, step: Step, state: InnerState, lam: Tree, batch: Any
    ) -> tuple[InnerState, FullTape]:
        check_fixed(lam, tape.lam, tape.versions, "a full trajectory")
        given = Exogenous.now(state, batch)
        new, loss = step.evaluate(state, lam, batch)
        check_during(new.t, batch, given.versions)
        tape.moments.append(given.moment(tape.rows.put(state), lam, loss))
        return new, tape

    @override
    def moments(self, tape: FullTape, step: Step, last: InnerState) -> Iterator[Moment]:
        return reversed(tape.moments)

    @override
    def complete(self, tape: FullTape) -> bool:
        return True
