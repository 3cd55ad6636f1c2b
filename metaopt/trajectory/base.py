"""What a trajectory is: the part of the inner run that an estimator remembers, and its way back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from metaopt import replay, tree
from metaopt.inner.contract import Linearized, Step, Wrt
from metaopt.inner.state import InnerState
from metaopt.replay import Rng
from metaopt.tree import Tree


class Moment(NamedTuple):
    """One step of the run, as it is visited again: everything ``Φ(state, λ; batch)`` depended on.

    Attributes:
        state: the state the step started from.
        lam: the hyperparameters it used.
        batch: its batch.
        rng: the random generators' states before it.
        linearized: its graph, where that was kept.
    """

    state: InnerState
    lam: Tree
    batch: Any
    rng: Rng
    linearized: Linearized | None = None

    def pullback(self, step: Step, cotangent: InnerState, wrt: Wrt = "both") -> tuple[InnerState | None, Tree]:
        """``(αA, αB)`` at this step, replaying its random draws; call inside :func:`metaopt.replay.preserved`."""
        if self.linearized is not None:
            return self.linearized.pullback(cotangent, wrt)
        replay.restore(self.rng)
        return step.vjp(self.state, self.lam, self.batch, cotangent, wrt=wrt)

    def linearize(self, step: Step) -> Linearized:
        """The step's graph, with the same random draws."""
        replay.restore(self.rng)
        return step.linearize(self.state, self.lam, self.batch)


class Trajectory(Protocol):
    """How a run is remembered. A tape is used by one run only: :meth:`record` may extend it in place.

    Properties:
        exact: whether the moments are those of the run (as far back as they go).
        bounded: whether memory stays the same however long the run is; such a tape can also live
            while λ moves.
    """

    @property
    def exact(self) -> bool:
        """See the class."""
        ...

    @property
    def bounded(self) -> bool:
        """See the class."""
        ...

    def start(self, state: InnerState, lam: Tree) -> Any:
        """An empty tape."""
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
        versions: :func:`versions_of` them, then.
        what: name of the estimator or trajectory that needs them fixed.
    """
    same = lam is used or all(a is b for a, b in zip(tree.leaves(lam), tree.leaves(used), strict=True))
    if not same or versions_of(lam) != versions:
        raise RuntimeError(
            f"lam moved during the run, but {what} needs it fixed (its pullback would mix different "
            "hyperparameters). Use an online "
            "estimator (FirstOrder, OneStep, TruncatedRMD, IFT, HyperDistill), or update lam between runs with "
            "mo.offline"
        )


def versions_of(lam: Tree) -> tuple[int, ...]:
    """In-place version counters: they tell when somebody wrote into λ."""
    return tuple([leaf._version for leaf in tree.leaves(lam) if isinstance(leaf, Tensor)])
