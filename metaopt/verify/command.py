"""What ``metaopt verify`` runs and prints."""

from __future__ import annotations

import time
from collections.abc import Iterator

from metaopt.table import Table
from metaopt.verify.report import Report, Row, worst
from metaopt.verify.subjects import Subject, subjects

PROPERTIES = ("its own inputs", "a second call", "vjp · x = y · jvp", "linearity", "every leaf")
"""What needs no reference, and is left out of the summary."""

SHOWN = 20
"""Failures that are printed one by one."""


def run(name: str | None = None, *, first: bool = False) -> bool:
    """Verify everything, or what is called ``name``; print tables; whether all passed.

    Without a name there is a line for each subject; with one, a line per comparison.

    Args:
        name: an estimator, trajectory, optimiser, solver, or way through a step.
        first: whether to stop at the first failure.

    Raises:
        ValueError: for a name that nothing has.
    """
    known = subjects()
    chosen = [subject for subject in known if name in (None, subject.name)]
    if not chosen:
        names = ", ".join(subject.name for subject in known)
        raise ValueError(f"nothing is called {name!r}; there are {names}")

    start = time.perf_counter()
    reports = list(_reports(chosen, first=first))
    table = summary(reports) if name is None else reports[0].table
    _print(table)

    failures = [(report, row) for report in reports for row in report.failures]
    for report, row in failures[:SHOWN]:
        print(f"{report.name} failed on {row.case} against {row.against}: error {row.error:.2e} {row.note}".rstrip())
    if len(failures) > SHOWN:
        print(f"… and {len(failures) - SHOWN} more; metaopt verify NAME shows every comparison")

    count = sum(len(report.rows) for report in reports)
    verdict = f"{len(failures)} FAILED" if failures else "all passed"
    seconds = time.perf_counter() - start
    print(f"{count} comparisons, {verdict}, {seconds:.0f} s")
    return all(report.passed for report in reports)


def _reports(chosen: list[Subject], *, first: bool) -> Iterator[Report]:
    for subject in chosen:
        rows: list[Row] = []
        for row in subject.guarded():
            rows.append(row)
            if first and not row.passed:
                yield Report(subject.name, tuple(rows))
                return
        yield Report(subject.name, tuple(rows))


def summary(reports: list[Report]) -> Table:
    """One line per subject: how many comparisons passed, the worst error, and what it was held to."""
    cells: list[tuple[str, ...]] = []
    for report in reports:
        count = len(report.rows)
        passed = count - len(report.failures)
        error = worst(report.rows).error
        cells.append((report.name, f"{passed} of {count}", f"{error:.0e}", _held_to(report)))
    bad = frozenset(number for number, report in enumerate(reports) if not report.passed)
    head = ("what", "passed", "worst", "held to")
    return Table("Everything held to a reference", head, tuple(cells), bad)


def _held_to(report: Report) -> str:
    """The references, and where theory makes an approximation exact."""
    notes: dict[str, dict[str, None]] = {}  # dicts keep the order, and each note once
    for row in report.rows:
        if row.against not in PROPERTIES:
            of_reference = notes.setdefault(row.against, {})
            if row.note:
                of_reference[row.note] = None

    parts = []
    for against, of_reference in notes.items():
        where = ""
        if against == "closed form" and of_reference:
            where = f" ({', '.join(of_reference)})"
        parts.append(f"{against}{where}")
    return ", ".join(parts)


def _print(table: Table) -> None:
    from rich.console import Console

    Console().print(table.rich())
