"""What every diagnostic returns: rows of numbers that print as a table, draw as a picture and convert to a dict."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from metaopt.estimators import Estimator

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

Estimators = Sequence[Estimator] | Mapping[str, Estimator]
"""A sequence (names are made from the settings), or name to estimator."""


class Result(ABC):
    """A diagnostic's outcome. Tables need ``rich`` and pictures ``matplotlib``; both are imported when asked for."""

    @property
    @abstractmethod
    def title(self) -> str:
        """One line: what was measured."""

    @abstractmethod
    def rows(self) -> list[dict[str, Any]]:
        """One dict per line of the table, all with the same keys."""

    @abstractmethod
    def draw(self, axes: Any) -> None:
        """Draw the main curve or bars into matplotlib axes."""

    def as_dict(self) -> dict[str, Any]:
        """Title and rows; NaN and infinities are ``None``, so that it is JSON."""
        return {"title": self.title, "rows": [{key: _json(value) for key, value in row.items()} for row in self.rows()]}

    def table(self) -> Table:
        """A table to print with ``rich``."""
        from rich.table import Table

        rows = self.rows()
        table = Table(title=self.title)
        for column in rows[0] if rows else ():
            table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
        for row in rows:
            table.add_row(*(shown(value) for value in row.values()))
        return table

    def figure(self) -> Figure:
        """A picture (no pyplot, so no backend is chosen): ``result.figure().savefig("x.png")``."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        axes.set_title(self.title, fontsize="medium")
        self.draw(axes)
        return figure

    def __str__(self) -> str:
        """Plain text, columns aligned."""
        rows = self.rows()
        lines = [list(rows[0]), *([shown(value) for value in row.values()] for row in rows)] if rows else []
        widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
        return "\n".join(
            [
                self.title,
                *("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines),
            ]
        )


def named(estimators: Estimators | Estimator) -> dict[str, Estimator]:
    """Name to estimator.

    Raises:
        ValueError: for no estimator at all, or two with the same settings.

    >>> import metaopt as mo
    >>> list(named([mo.RMD(), mo.HyperDistill(gamma=0.9)]))
    ['RMD', 'HyperDistill(gamma=0.9)']
    """
    if isinstance(estimators, Estimator):
        estimators = [estimators]
    if isinstance(estimators, Mapping):
        found = dict(estimators)
    else:
        found = {_name(estimator): estimator for estimator in estimators}
        if len(found) < len(estimators):
            raise ValueError(
                f"two estimators have the same settings ({', '.join(found)}): name them, {{'one': ..., 'two': ...}}"
            )
    if not found:
        raise ValueError("no estimator was given")
    return found


def _name(estimator: Estimator) -> str:
    """The class, and the settings that are not the default."""
    settings = []
    for field in fields(estimator):  # type: ignore[arg-type]  (estimators are dataclasses)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        value = getattr(estimator, field.name)
        if value != default:
            settings.append(f"{field.name}={value:.4g}" if isinstance(value, float) else f"{field.name}={value!r}")
    return type(estimator).__name__ + (f"({', '.join(settings)})" if settings else "")


def shown(value: Any) -> str:
    """A cell: floats with four digits, an undefined number as a dash."""
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.4g}"
    return "–" if value is None else str(value)


def _json(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
