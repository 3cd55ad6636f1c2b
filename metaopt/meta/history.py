"""The numbers of a loop, kept: a table, a picture, a file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from tqdm import tqdm

from metaopt import files, tree
from metaopt.meta.report import Report, Reports
from metaopt.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def progress(reports: Iterable[Report], history: History | None = None) -> Iterator[Report]:
    """The reports of :func:`metaopt.tune` or :func:`metaopt.online`, behind a progress bar.

    The bar shows the outer loss and the norm of the hypergradient, in a terminal or a notebook. A
    loop that goes on from a checkpoint starts where it had got to.

    Args:
        reports: what the loop yields.
        history: keeps the numbers of each report.
    """
    total, unit = (reports.total, reports.unit) if isinstance(reports, Reports) else (None, "report")
    with tqdm(total=total, unit=unit) as bar:
        for report in reports:
            if history is not None:
                history.add(report)
            if bar.n == 0 and report.number > 1:
                bar.initial = report.number - 1
            bar.n = report.number
            bar.set_postfix_str(_postfix(report), refresh=False)
            bar.update(0)
            yield report
        bar.refresh()


class History:
    """What a loop reported, as plain numbers: the outer loss, λ, the hypergradient's norms, time, memory.

    ``print`` shows a table. Tensors are not kept: of a leaf of λ with one number there is its
    value, of a larger one its norm, ``|name|``.

    Attributes:
        rows: one dictionary of numbers per report; NaN where λ did not move.

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, x: lam.exp() * (w - x).square().sum(), mo.optim.SGD(lr=0.1))
    >>> loss = lambda w, lam, x: (w - x).square().sum()
    >>> problem = mo.Problem(step, loss, torch.zeros(2), torch.tensor(0.0), [torch.ones(2)] * 5, torch.ones(2))
    >>> history = History()
    >>> for report in problem.tune(optimizer=lambda p: torch.optim.Adam(p, lr=0.1), runs=2):
    ...     history.add(report)
    >>> [round(value, 3) for value in history["outer loss"]]
    [0.215, 0.165]
    """

    def __init__(self, rows: list[dict[str, float]] | None = None) -> None:
        """Begin, or go on from rows."""
        self.rows = [] if rows is None else rows

    def add(self, report: Report) -> None:
        """Keep the numbers of a report.

        A resumed loop repeats what came after its last checkpoint: rows that come again are
        replaced. Numbers that begin again at 1 are those of another loop, and are added.
        """
        if not isinstance(report, Report):
            raise TypeError(f"a history keeps the reports of mo.tune and mo.online, got {type(report).__name__}")
        while report.number > 1 and self.rows and self.rows[-1]["number"] >= report.number:
            self.rows.pop()
        row = {"number": report.number, "outer loss": _number(report.outer_loss)}
        row |= {_norm_of(name): norm for name, norm in report.norms.items()}
        for name, leaf in zip(tree.dotted_names(report.lam), tree.leaves(report.lam), strict=True):
            name = name or "lam"
            if leaf.numel() == 1:
                row[name] = float(leaf)
            else:
                row[f"|{name}|"] = float(leaf.norm())
        row |= {"seconds": report.seconds, "bytes": report.bytes, "skipped": report.skipped}
        self.rows.append(row)

    def __len__(self) -> int:
        """How many reports were kept."""
        return len(self.rows)

    def __getitem__(self, column: str) -> list[float]:
        """A column, NaN where a report has nothing there.

        Raises:
            KeyError: if there is no such column; the message lists those there are.
        """
        if column not in self.columns:
            raise KeyError(f"no column {column!r}; there are {list(self.columns)}")
        return [row.get(column, math.nan) for row in self.rows]

    @property
    def columns(self) -> tuple[str, ...]:
        """All names that occur in the rows, in the order in which they came."""
        names: dict[str, None] = {}
        for row in self.rows:
            names |= dict.fromkeys(row)
        return tuple(names)

    def table(self, last: int | None = None) -> Table:
        """One line per report, or of the last ones."""
        rows = self.rows if last is None else self.rows[-last:]
        title = f"{len(self)} reports"
        if len(rows) < len(self):
            title = f"the last {len(rows)} of {title}"
        columns = self.columns
        cells = []
        for row in rows:
            cells.append(tuple(row.get(name, math.nan) for name in columns))
        return Table(title, columns, tuple(cells))

    def figure(self) -> Figure:
        """Outer loss, hyperparameters, and the norms of the hypergradient, one panel each."""
        from matplotlib.figure import Figure

        norms = [name for name in self.columns if name.startswith(_norm_of("")[:-1])]
        apart = {"number", "outer loss", "seconds", "bytes", "skipped", *norms}
        panels = {
            "outer loss": ["outer loss"],
            "hyperparameters": [name for name in self.columns if name not in apart],
            "norm of the hypergradient": norms,
        }
        figure = Figure(figsize=(11, 3.4), layout="constrained")
        for axes, (title, names) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            for name in names:
                axes.plot(self["number"], self[name], marker="." if len(self) < 30 else None, label=name)
            axes.set(title=title, xlabel="report")
            axes.grid(alpha=0.25)
            if len(names) > 1:
                axes.legend(fontsize="small")
        return figure

    def save(self, path: str | Path) -> None:
        """Write the rows as JSON, for :meth:`load`; a kill leaves the old file or the new one."""
        files.write_text(Path(path), json.dumps({"metaopt history": 1, "rows": self.rows}, indent=1))

    @classmethod
    def load(cls, path: str | Path) -> History:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: if the file is something else; it is named.
        """
        try:
            content = json.loads(Path(path).read_text())
            rows = content["rows"] if content["metaopt history"] == 1 else None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a history that metaopt wrote, or is damaged") from error
        if rows is None:
            raise ValueError(f"{path} is a history of another version of metaopt")
        return cls(rows)

    def __repr__(self) -> str:
        """The last rows as plain text."""
        return self.table(last=10).text() if self.rows else "History(no reports yet)"

    def _repr_html_(self) -> str:
        return self.table(last=10).html()


def _norm_of(name: str) -> str:
    return f"|dL/d {name}|"


def _number(value: Tensor | None) -> float:
    return math.nan if value is None else float(value)


def _postfix(report: Report) -> str:
    parts = []
    if report.outer_loss is not None:
        norm = math.hypot(*report.norms.values())
        parts += [f"outer loss {float(report.outer_loss):.4g}", f"|hypergradient| {norm:.3g}"]
    if report.skipped:
        parts += [f"skipped {report.skipped}"]
    return ", ".join(parts)
