r"""Where to put checkpoints: binomial schedules.

With c slots (the start counts as one) and every step run forward at most r times, the longest run
that can be reversed has

.. math:: T = \binom{c + r}{c}

steps. Griewank and Walther 2000 ("Revolve") place checkpoints for a known T; Wang, Moin and
Iaccarino 2009 for a T that is not known while the run goes, with at most one more repetition.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import comb

from typing_extensions import override


def reach(slots: int, repetitions: int) -> int:
    """Longest run that ``slots`` checkpoints reverse with every step run forward at most ``repetitions`` times.

    >>> reach(17, 3)
    1140
    """
    return comb(slots + repetitions, slots) if slots >= 0 and repetitions >= 0 else 0


def split(length: int, slots: int) -> int:
    """How far behind the newest checkpoint the next one goes.

    ``length`` steps are to be reversed with ``slots`` checkpoints, of which the newest is one.

    Returns:
        A distance in ``1 … length - 1``, or ``length`` where no further checkpoint helps.
    """
    if slots <= 1 or length <= 1:
        return length
    repetitions = 0
    while reach(slots, repetitions) < length:
        repetitions += 1
    return max(1, min(reach(slots, repetitions - 1), length - reach(slots - 1, repetitions - 1)))


@dataclass
class Placement:
    """Which states of a run in progress are checkpoints. State 0 always is.

    :meth:`visit` is told every state in turn and says whether to keep it and which older one to let
    go.

    Attributes:
        kept: numbers of the states held now, ascending.
    """

    kept: list[int] = field(default_factory=lambda: [0])

    def visit(self, index: int) -> tuple[bool, int | None]:
        """``(keep, dropped)`` for state ``index``."""
        raise NotImplementedError

    def forget(self, newest: int) -> None:
        """States after ``newest`` are held no longer."""
        self.kept = [index for index in self.kept if index <= newest]


@dataclass
class Binomial(Placement):
    """At most ``slots`` checkpoints; ``horizon`` is T where it is known.

    Unknown T: a new checkpoint has level 0 and replaces an older one that has a later one of higher
    level; where there is none, the newest moves on by one step and up by one level.
    """

    slots: int = 17
    horizon: int | None = None
    levels: dict[int, int] = field(default_factory=dict)

    @override
    def visit(self, index: int) -> tuple[bool, int | None]:
        if self.horizon is not None and index < self.horizon:
            newest = self.kept[-1]
            if len(self.kept) == self.slots:
                return False, None
            return self._keep(
                index >= newest + split(self.horizon - newest, self.slots - len(self.kept) + 1), index, None
            )
        if len(self.kept) < self.slots:
            return self._keep(True, index, None)
        if self.slots == 1:
            return False, None
        highest = 0
        for old in reversed(self.kept[1:]):
            if self.levels.get(old, 0) < highest:
                return self._keep(True, index, old)
            highest = max(highest, self.levels.get(old, 0))
        newest = self.kept[-1]
        self.levels[index] = self.levels.get(newest, 0) + 1
        return self._keep(True, index, newest)

    def _keep(self, keep: bool, index: int, dropped: int | None) -> tuple[bool, int | None]:
        if dropped is not None:
            self.kept.remove(dropped)
            self.levels.pop(dropped, None)
        if keep:
            self.kept.append(index)
        return keep, dropped


@dataclass
class Periodic(Placement):
    """States 0, k, 2k, … with k = ``every``."""

    every: int = 1

    @override
    def visit(self, index: int) -> tuple[bool, int | None]:
        keep = index % self.every == 0
        if keep:
            self.kept.append(index)
        return keep, None


@dataclass
class SquareRoot(Placement):
    """Every k-th state with k about √T, T unknown.

    Whenever there are more than 2k checkpoints, every other one goes and k doubles.

    Memory: at most ``√(2T) + 1`` checkpoints.
    """

    every: int = 1
    leaving: list[int] = field(default_factory=list)

    def visit(self, index: int) -> tuple[bool, int | None]:
        """See the class. One checkpoint leaves per visit, so that the two sides stay in step."""
        keep = index % self.every == 0
        if keep:
            self.kept.append(index)
        if len(self.kept) - len(self.leaving) > 2 * self.every:
            self.every *= 2
            self.leaving = [i for i in self.kept if i % self.every]
        if not self.leaving:
            return keep, None
        dropped = self.leaving.pop()
        self.kept.remove(dropped)
        return keep, dropped
