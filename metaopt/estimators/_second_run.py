"""Estimators that take a second run along with the inner one.

It descends the outer loss too, so they belong to one outer loss.
"""

from __future__ import annotations

from typing import Any, Protocol

from metaopt import replay
from metaopt.estimators.base import Estimator, Pullback
from metaopt.estimators.implicit import LastBatch
from metaopt.inner import InnerState, Step
from metaopt.replay import Rng
from metaopt.tree import Tree


class Carry(Protocol):
    """What such a method carries: a NamedTuple with the last batch."""

    @property
    def last(self) -> LastBatch:
        """The batch of the last step, and the random state before it."""
        ...

    def _replace(self, **changes: Any) -> Any: ...


class SecondRun(Estimator):
    """What F2SA and BOME share: the inner run is left alone, and ``observe`` moves the second one."""

    @property
    def needs_outer_loss(self) -> bool:
        """Yes: the second run descends it too."""
        return True

    def advance(self, step: Step, state: InnerState, lam: Tree, batch: Any, carry: Carry) -> tuple[InnerState, Any]:
        """A plain step; its batch is kept."""
        rng = replay.snapshot(state)
        return step(state, lam, batch), carry._replace(last=LastBatch(batch, rng))

    def respond(self, step: Step, state: InnerState, lam: Tree, carry: Carry) -> tuple[Tree, Pullback]:
        """None.

        Raises:
            TypeError: always; the second run belongs to one outer loss.
        """
        raise TypeError(
            f"{type(self).__name__} descends one outer loss along the run and has no pullback for another: use "
            "mo.hypergradient or mo.online"
        )

    def _seen(self, carry: Carry) -> tuple[Any, Rng]:
        if carry.last.rng is None:
            raise ValueError(f"{type(self).__name__} has seen no inner step yet")
        return carry.last.batch, carry.last.rng
