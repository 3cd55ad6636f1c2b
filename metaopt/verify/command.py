"""What ``metaopt verify`` runs."""

from __future__ import annotations

from metaopt import estimators
from metaopt.estimators import Estimator
from metaopt.verify.checks import Report, Row, verify_class


def run(name: str | None = None) -> bool:
    """Verify every public estimator (a line per reference), or the one called ``name`` (a line per check); print the table; whether all passed.

    "own formula": the estimator against its formula written out with dense matrices; "closed form":
    against the true hypergradient, where the last column says why theory makes it exact.

    Raises:
        ValueError: for a name that no estimator has.
    """
    classes = public_estimators()
    if name is not None and name not in classes:
        raise ValueError(f"no estimator is called {name!r}; there are {', '.join(classes)}")
    reports = [verify_class(kind) for key, kind in classes.items() if name in (None, key)]
    print(table(reports, every_row=name is not None))
    return all(report.passed for report in reports)


def public_estimators() -> dict[str, type[Estimator]]:
    """The concrete estimators at the front door, by name."""
    found = {name: getattr(estimators, name) for name in estimators.__all__}
    return {
        name: kind
        for name, kind in found.items()
        if isinstance(kind, type) and issubclass(kind, Estimator) and kind is not Estimator
    }


def table(reports: list[Report], *, every_row: bool = False) -> str:
    """One line per estimator and reference (or per check), in plain text; below it every failure."""
    cells = [("estimator", "case" if every_row else "passed", "against", "error", "tolerance", "exact by theory", "")]
    for report in reports:
        for row in report.rows if every_row else _worst(report):
            verdict = "ok" if row.passed else "FAILED"
            cells.append(
                (report.name, row.case, row.against, f"{row.error:.1e}", f"{row.tolerance:.0e}", row.note, verdict)
            )
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    lines.insert(1, "  ".join("-" * width for width in widths).rstrip())
    failures = [(report, row) for report in reports for row in report.failures]
    lines += [
        f"{report.name} failed on {row.case} against {row.against}: error {row.error:.2e} {row.note}".rstrip()
        for report, row in failures
    ]
    return "\n".join(lines)


def _worst(report: Report) -> list[Row]:
    """One row per reference: the worst error, how many passed."""
    summary = []
    for against in dict.fromkeys(row.against for row in report.rows):
        rows = [row for row in report.rows if row.against == against]
        worst = max(rows, key=lambda row: row.error)
        notes = ", ".join(dict.fromkeys(row.note for row in rows if row.note))
        summary.append(worst._replace(case=f"{sum(row.passed for row in rows)} of {len(rows)}", note=notes))
    return summary
