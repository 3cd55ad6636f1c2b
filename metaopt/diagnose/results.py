"""What every diagnostic returns: rows of numbers that print as a table, draw as a picture and convert to a dict."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from metaopt.estimators import Estimator
from metaopt.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Estimators = Sequence[Estimator] | Mapping[str, Estimator]
"""A sequence (names are made from the settings), or name to estimator."""


class Result(ABC):
    """A diagnostic's outcome. Pictures need ``matplotlib``, which is imported when it is asked for."""

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
        """One line per row; ``print`` and notebooks show it."""
        rows = self.rows()
        heads = tuple(rows[0]) if rows else ()
        return Table(self.title, heads, tuple([tuple(row.values()) for row in rows]))

    def figure(self) -> Figure:
        """A picture (no pyplot, so no backend is chosen): ``result.figure().savefig("x.png")``."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        axes.set_title(self.title, fontsize="medium")
        self.draw(axes)
        return figure

    def __repr__(self) -> str:
        """The table as plain text."""
        return self.table().text()

    def _repr_html_(self) -> str:
        return self.table().html()


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


def _json(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
