"""What a verification found: one row per comparison."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from typing_extensions import override

from metaopt.table import Table


class Row(NamedTuple):
    """One comparison.

    Attributes:
        case: the problem, or the property of a step.
        against: what it was compared with.
        error: relative to the reference's norm where that is above 1, else absolute.
        tolerance: what the error may be.
        note: what went wrong, or why theory makes the comparison exact.
    """

    case: str
    against: str
    error: float
    tolerance: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance (NaN is not)."""
        return self.error <= self.tolerance


@dataclass(frozen=True, repr=False)
class Report:
    """Every comparison of one estimator, step, trajectory, optimiser or solver.

    ``print(report)`` shows a table; a notebook shows it as HTML.

    Attributes:
        name: what was verified.
        rows: the comparisons.
        skipped: what could not be compared, and why, one sentence each.
    """

    name: str
    rows: tuple[Row, ...]
    skipped: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether there were comparisons, and all passed."""
        return bool(self.rows) and not self.failures

    @property
    def failures(self) -> tuple[Row, ...]:
        """The comparisons that did not pass."""
        return tuple(row for row in self.rows if not row.passed)

    @property
    def verdict(self) -> str:
        """One line: passed, failed, or why nothing was compared."""
        if not self.rows:
            return "nothing was checked"
        passed = len(self.rows) - len(self.failures)
        count = f"{passed} of {len(self.rows)} checks"
        return f"passed, {count}" if self.passed else f"FAILED, {count}"

    @property
    def table(self) -> Table:
        """The verdict, and below it one line per comparison."""
        cells = []
        for row in self.rows:
            verdict = "ok" if row.passed else "FAIL"
            cells.append((verdict, row.case, row.against, f"{row.error:.1e}", row.note))
        bad = frozenset(number for number, row in enumerate(self.rows) if not row.passed)
        title = f"{self.name}: {self.verdict}"
        head = ("", "case", "against", "error", "note")
        return Table(title, head, tuple(cells), bad)

    @override
    def __repr__(self) -> str:
        shown = self.table.text() if self.rows else self.table.title
        skipped = [f"  skipped: {reason}" for reason in self._reasons()]
        return "\n".join([shown, *skipped])

    def _repr_html_(self) -> str:
        table = self.table.html()
        reasons = "".join(f"<li>{reason}</li>" for reason in self._reasons())
        if not reasons:
            return table
        return f"{table}<p>Skipped:</p><ul>{reasons}</ul>"

    def _reasons(self) -> tuple[str, ...]:
        """Why something was left out: always where nothing was compared, else only in a few words."""
        if not self.rows and not self.skipped:
            return ("no problem was given",)
        return self.skipped


def relative_error(got: Tensor, want: Tensor) -> float:
    """``|got - want| / max(|want|, 1)``; infinite where the sizes differ."""
    if got.shape != want.shape:
        return float("inf")
    scale = want.norm().clamp_min(1.0)
    return float((got - want).norm() / scale)


def worst(rows: Iterable[Row]) -> Row:
    """The row that is furthest off for its tolerance; NaN is further than anything."""

    def badness(row: Row) -> tuple[bool, float]:
        return not row.passed, row.error

    return max(rows, key=badness)
