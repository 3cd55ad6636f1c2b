"""What a trajectory is: the part of the inner run that an estimator remembers, and its way back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from metaopt import replay, tree
from metaopt.inner.contract import Linearized, Step, Wrt
from metaopt.inner.state import InnerState
from metaopt.replay import Rng
from metaopt.tree import Tree


class Losses(NamedTuple):
    """The inner loss of step ``t`` in the run, and when the step was replayed."""

    t: int
    run: Tensor
    replay: Tensor


class Moment(NamedTuple):
    """One step of the run, as it is visited again: everything ``Φ(state, λ; batch)`` depended on.

    Attributes:
        state: the state the step started from.
        lam: the hyperparameters it used.
        batch: its batch.
        rng: the random generators' states before it.
        linearized: its graph, where that was kept.
        versions: in-place version counters of the batch in the run; ``None`` where it was made
            for this visit.
        loss: the inner loss of the run; ``None`` where it is not known.
    """

    state: InnerState
    lam: Tree
    batch: Any
    rng: Rng
    linearized: Linearized | None = None
    versions: tuple[int, ...] | None = None
    loss: Tensor | None = None

    def moved(self, w: Tree) -> Moment:
        """The same step from other weights."""
        return self._replace(state=self.state._replace(w=w))

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside, the step's random draws come again; afterwards the generators are as they were."""
        with replay.preserved(self.state):
            self._rewind()
            yield

    def pullback(
        self, step: Step, cotangent: InnerState, wrt: Wrt = "both", losses: list[Losses] | None = None
    ) -> tuple[InnerState | None, Tree]:
        """``(αA, αB)`` at this step, replaying its random draws.

        Call inside :func:`metaopt.replay.preserved`.

        ``losses`` gets the inner loss of the run and that of the replay, where both are known.
        """
        if self.linearized is not None:
            return self.linearized.pullback(cotangent, wrt)
        self._rewind()
        if self.loss is None or losses is None:
            return step.vjp(self.state, self.lam, self.batch, cotangent, wrt=wrt)
        again = step.linearize(self.state, self.lam, self.batch)
        if (loss := again.loss) is not None:
            losses.append(Losses(self.state.t + 1, self.loss, loss))
        return again.pullback(cotangent, wrt, last=True)

    def linearize(self, step: Step) -> Linearized:
        """The step's graph, with the same random draws."""
        self._rewind()
        return step.linearize(self.state, self.lam, self.batch)

    def _rewind(self) -> None:
        if self.versions is not None:
            check_since(self.state.t + 1, self.batch, self.versions)
        replay.restore(self.rng)


class Exogenous(NamedTuple):
    """What a step takes from outside: its batch, and the random state before it.

    Attributes:
        batch: the batch.
        rng: the random generators' states before the step.
        versions: in-place version counters of the batch's tensors.
    """

    batch: Any
    rng: Rng
    versions: tuple[int, ...]

    @classmethod
    def now(cls, state: InnerState, batch: Any) -> Exogenous:
        """What the step that leaves ``state`` will take from outside."""
        return cls(batch, replay.snapshot(state), replay.versions_of(batch))

    def moment(self, state: InnerState, lam: Tree, loss: Tensor | None = None) -> Moment:
        """The step from ``state`` with these."""
        return Moment(state, lam, self.batch, self.rng, versions=self.versions, loss=loss)


class Trajectory(Protocol):
    """How a run is remembered.

    A tape is used by one run only: :meth:`record` may extend it in place.

    Attributes:
        exact: whether the moments are those of the run, as far back as they go.
        bounded: whether memory stays the same however long the run is. Such a tape can also live
            while λ moves.
    """

    exact: ClassVar[bool]
    bounded: ClassVar[bool]

    def start(self, state: InnerState, lam: Tree) -> Any:
        """A tape that holds no step yet."""
        ...

    def record(self, tape: Any, step: Step, state: InnerState, lam: Tree, batch: Any) -> tuple[InnerState, Any]:
        """Take one step and remember it."""
        ...

    def moments(self, tape: Any, step: Step, last: InnerState) -> Iterator[Moment]:
        """The remembered steps, newest first; ``last`` is the state the run has reached."""
        ...

    def complete(self, tape: Any) -> bool:
        """Whether :meth:`moments` goes back to the initial state of the run itself."""
        ...


def check_fixed(lam: Tree, used: Tree, versions: tuple[int, ...], what: str) -> None:
    """Raise if λ is not what the run has been using.

    Args:
        lam: hyperparameters of this step.
        used: hyperparameters the run started with.
        versions: :func:`metaopt.replay.versions_of` them, then.
        what: name of the estimator or trajectory that needs them fixed.
    """
    same = lam is used or all(a is b for a, b in zip(tree.leaves(lam), tree.leaves(used), strict=True))
    if not same or replay.versions_of(lam) != versions:
        raise RuntimeError(
            f"lam moved during the run, but {what} needs it fixed (its pullback would mix different "
            "hyperparameters). Use an online estimator (FirstOrder, OneStep, TruncatedRMD, IFT, HyperDistill), or "
            "move lam between runs"
        )


def check_during(t: int, batch: Any, versions: tuple[int, ...]) -> None:
    """Raise if step ``t`` has written into its batch."""
    replay.check_unwritten(
        batch,
        versions,
        f"step {t} wrote into its batch: what it read",
        "work on a copy (x.clone()), or leave out what works in place (inplace=True, x.sub_(...)). "
        "RMD(mo.trajectory.Graphs()) replays nothing",
    )


def check_since(t: int, batch: Any, versions: tuple[int, ...]) -> None:
    """Raise if the batch of step ``t`` was written into after the step."""
    replay.check_unwritten(
        batch,
        versions,
        f"the batch of step {t}",
        "if one buffer takes all batches, clone it for each step, or pass the function that fills it, "
        "mo.trajectory.Checkpointed(batches=...)",
    )


def check_replayed(losses: list[Losses]) -> None:
    """Raise if a step had another inner loss when it was replayed than in the run, by more than rounding."""
    if not losses:
        return
    run = torch.stack([pair.run for pair in losses]).tolist()
    again = torch.stack([pair.replay for pair in losses]).tolist()
    largest = max([abs(x) for x in run if math.isfinite(x)], default=0.0)
    tolerance = largest * min(ROUNDINGS * torch.finfo(losses[0].run.dtype).eps, 0.1)
    off = [i for i, (a, b) in enumerate(zip(run, again, strict=True)) if abs(a - b) > tolerance]
    if not off:
        return
    first = off[0]
    raise RuntimeError(
        f"step {losses[first].t} had the inner loss {run[first]:.6g} in the run and {again[first]:.6g} when it was "
        "replayed: the hypergradient would be that of another run. Something in the loss changes from call to call "
        "and is not drawn from torch's global generator (numpy, a torch.Generator, a counter, an environment): draw "
        "it outside and pass it with the batch. RMD(mo.trajectory.Graphs()) replays nothing"
    )


ROUNDINGS = 1e4
"""Two evaluations of a loss differ by at most this many roundings.

Torch picks kernels by what is to be differentiated, so that a replay may round otherwise.
"""
