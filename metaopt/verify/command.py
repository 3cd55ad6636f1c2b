"""What ``metaopt verify`` runs."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from metaopt import estimators
from metaopt.estimators import Estimator
from metaopt.verify.checks import Report, Row, verify_class


def run(name: str | None = None) -> bool:
    """Verify every public estimator, or the one called ``name``; print a table; whether all passed.

    Raises:
        ValueError: for a name that no estimator has.
    """
    classes = public_estimators()
    if name is not None and name not in classes:
        raise ValueError(f"no estimator is called {name!r}; there are {', '.join(classes)}")
    reports = [verify_class(kind) for key, kind in classes.items() if name in (None, key)]
    show(reports, every_row=name is not None)
    return all(report.passed for report in reports)


def public_estimators() -> dict[str, type[Estimator]]:
    """The concrete estimators at the front door, by name."""
    found = {name: getattr(estimators, name) for name in estimators.__all__}
    return {name: kind for name, kind in found.items() if isinstance(kind, type) and issubclass(kind, Estimator) and kind is not Estimator}


def show(reports: list[Report], *, every_row: bool = False) -> None:
    """A table of one line per estimator and reference (or of every check), failures in full below."""
    table = Table("estimator", "case" if every_row else "checks", "against", "error", "tolerance", "theory", "", title="metaopt verify")
    for report in reports:
        rows = report.rows if every_row else _worst(report)
        for row in rows:
            mark = "[green]passed[/]" if row.passed else "[red]FAILED[/]"
            table.add_row(report.name, row.case, row.against, f"{row.error:.1e}", f"{row.tolerance:.0e}", row.note, mark)
    console = Console()
    console.print(table)
    for report in reports:
        for row in report.failures:
            console.print(f"[red]{report.name}[/] failed on {row.case} against {row.against}: error {row.error:.2e} {row.note}")


def _worst(report: Report) -> list[Row]:
    """One row per reference: the worst error, how many passed."""
    summary = []
    for against in dict.fromkeys(row.against for row in report.rows):
        rows = [row for row in report.rows if row.against == against]
        worst = max(rows, key=lambda row: row.error)
        notes = ", ".join(dict.fromkeys(row.note for row in rows if row.note))
        summary.append(worst._replace(case=f"{sum(row.passed for row in rows)} of {len(rows)}", note=notes))
    return summary
