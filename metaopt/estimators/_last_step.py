"""Estimators that look at the last inner step alone: how that step is remembered, once for all of them."""

from __future__ import annotations

from typing import Any, NamedTuple

from typing_extensions import override

from metaopt.estimators.base import Estimator, Pullback
from metaopt.inner.contract import Step
from metaopt.inner.state import InnerState
from metaopt.trajectory import Moment
from metaopt.trajectory.base import Exogenous, check_during
from metaopt.tree import Tree


class Remembered(NamedTuple):
    """What such an estimator carries.

    Attributes:
        last: the last step as it is looked at again, or ``None`` before the first one.
        own: what else the method carries along.
    """

    last: Moment | None = None
    own: Any = None


class FromLastStep(Estimator):
    """The last step is remembered: its state, λ, batch and random draws. Nothing else of the run is."""

    def start_of(self, state: InnerState, lam: Tree) -> Any:
        """What the method itself carries before the first step."""
        return None

    def looked_at(self, taken: Moment, new: InnerState) -> Moment:
        """Where the method looks at the step that was taken. Default: its batch, at the new weights."""
        return taken._replace(state=new)

    @override
    def init(self, step: Step, state: InnerState, lam: Tree) -> Remembered:
        return Remembered(own=self.start_of(state, lam))

    @override
    def advance(
        self, step: Step, state: InnerState, lam: Tree, batch: Any, carry: Remembered
    ) -> tuple[InnerState, Remembered]:
        given = Exogenous.now(state, batch)
        taken = given.moment(state, lam)
        new = step(state, lam, batch)
        check_during(new.t, batch, given.versions)
        return new, carry._replace(last=self.looked_at(taken, new))

    def last_of(self, carry: Remembered) -> Moment:
        """The last step.

        Raises:
            ValueError: before the first one.
        """
        if carry.last is None:
            raise ValueError(f"{type(self).__name__} has seen no inner step yet: it needs the batch of the last one")
        return carry.last


class AlongOneOuterLoss(FromLastStep):
    """Methods that follow one outer loss along the run, so that they have no pullback for another."""

    needs_outer_loss = True

    @override
    def respond(self, step: Step, state: InnerState, lam: Tree, carry: Remembered) -> tuple[Tree, Pullback]:
        raise TypeError(
            f"{type(self).__name__} follows one outer loss along the run and has no pullback for another: use "
            "mo.hypergradient or mo.online"
        )
