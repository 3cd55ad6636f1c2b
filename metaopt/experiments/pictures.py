"""The house style of pictures and tables: one colour for a method everywhere, direct labels, tables for any width."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console, Group, RenderableType
from rich.table import Column, Table

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Colours that are told apart with any kind of colour vision (yellow is left out, it is too pale for a line)."""

_GREY = "#7F7F7F"

_COLOURS: Mapping[str, str] = {
    "HyperDistill": OKABE_ITO[0],
    "1-step": OKABE_ITO[1],
    "DrMAD": OKABE_ITO[2],
    "N.IFT": OKABE_ITO[3],
    "FO": OKABE_ITO[4],
    "EvoGrad": OKABE_ITO[5],
    "RMD": OKABE_ITO[6],
    "angle given": OKABE_ITO[6],
    "baseline": _GREY,
    "uniform weights": _GREY,
    "frozen random net": "#8C564B",
}
"""By the beginning of a method's name, so that it looks the same in every figure."""

_DASHES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D")

RIGHT = OKABE_ITO[0]
WRONG = OKABE_ITO[1]
"""Of examples with the right label, and with a wrong one."""

DIRECT = 5
"""So many lines or fewer are labelled at their ends; more have a legend."""


class Style(NamedTuple):
    """How a method is drawn."""

    color: str
    linestyle: str
    marker: str


def styles(names: Sequence[str]) -> dict[str, Style]:
    """How each method is drawn: variants of one method share its colour and differ in dashes and markers."""
    found: dict[str, Style] = {}
    for name in names:
        colour = next((colour for start, colour in _COLOURS.items() if name.startswith(start)), _GREY)
        number = sum(style.color == colour for style in found.values()) % len(_DASHES)
        found[name] = Style(colour, _DASHES[number], _MARKERS[number])
    return found


def panels(width: float, height: float, rows: int = 1, columns: int = 1, **shared: Any) -> tuple[Figure, Any]:
    """A figure and its grid of axes; several have letters (a), (b), … to the left of their titles."""
    figure = Figure(figsize=(width, height), layout="constrained")  # not pyplot: no backend is chosen for the user
    grid = figure.subplots(rows, columns, squeeze=False, **shared)
    for axes in grid.flat:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if rows * columns > 1:
        for letter, axes in zip("abcdefghijklmnopqrstuvwxyz", grid.flat, strict=False):
            axes.set_title(f"({letter})", loc="left", fontsize="medium")
    return figure, grid


def draw_line(axes: Axes, x: Any, y: Any, **style: Any) -> None:
    """A line; a point where there is one value only, because a line of one point cannot be seen."""
    marker = "o" if np.isfinite(np.asarray(y, dtype=float)).sum() == 1 else None
    axes.plot(x, y, **{"linewidth": 1.8, "marker": marker, **style})


def name_lines(axes: Axes) -> None:
    """Each line's name at its end where the lines are few, otherwise in a legend beside the axes."""
    lines = [line for line in axes.lines if not line.get_label().startswith("_")]  # type: ignore[union-attr]
    ends = [np.asarray(line.get_ydata(), dtype=float) for line in lines]
    if len(lines) > DIRECT or any(not np.isfinite(y[-1:]).all() for y in ends):
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9, frameon=False)
        return
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]
    order = sorted(lines, key=lambda line: np.asarray(line.get_ydata(), dtype=float)[-1])
    heights = []
    for line in order:
        end = (0.0, float(np.asarray(line.get_ydata(), dtype=float)[-1]))
        heights.append(axes.transAxes.inverted().transform(axes.transData.transform(end))[1])
    for line, height in zip(order, _apart(heights), strict=True):
        axes.annotate(
            str(line.get_label()),
            (1.01, height),
            xycoords="axes fraction",
            color=line.get_color(),
            va="center",
            fontsize=9,
        )


def _apart(heights: Sequence[float], distance: float = 0.06) -> list[float]:
    """Ascending heights on axes from 0 to 1, moved so that none is closer to the next than ``distance``."""
    moved = np.clip(heights, 0, 1)
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + distance)
    moved[-1:] = np.minimum(moved[-1:], 1)
    for i in range(len(moved) - 2, -1, -1):
        moved[i] = min(moved[i], moved[i + 1] - distance)
    return moved.tolist()


def draw_curves(
    curves: Mapping[str, Sequence[Sequence[float]]],
    path: Path,
    *,
    title: str,
    ylabel: str,
    xlabel: str = "inner runs",
    every: int = 1,
    yscale: str = "log",
) -> None:
    """Median over seeds of each method's curve, with the middle half of the seeds shaded.

    Args:
        curves: name of a method -> a curve per seed; a curve that broke off counts as infinite
            from there.
        path: of the picture.
        title: what is seen.
        ylabel: what the curves show.
        xlabel: what they are drawn over.
        every: distance between a curve's points.
        yscale: ``"log"`` or ``"linear"``.
    """
    figure, ((axes,),) = panels(10, 5)
    for name, style in styles(list(curves)).items():
        all_curves = curves[name]
        found = [curve for curve in all_curves if curve]
        if not found:
            continue
        length = max(len(curve) for curve in found)
        padded = np.array([[*curve, *[math.inf] * (length - len(curve))] for curve in found])
        low, middle, high = np.quantile(padded, [0.25, 0.5, 0.75], axis=0, method="nearest")
        m = every * np.arange(1, length + 1)
        draw_line(axes, m, middle, label=name, color=style.color, linestyle=style.linestyle)
        axes.fill_between(m, low, np.minimum(high, 1e3), color=style.color, alpha=0.12, linewidth=0)
    seeds = max((len(all_curves) for all_curves in curves.values()), default=0)
    shaded = f": median of {seeds} seeds, the middle half shaded" if seeds > 1 else ""
    axes.set(xlabel=xlabel, ylabel=ylabel, yscale=yscale, title=title + shaded)
    finite = [
        value for all_curves in curves.values() for curve in all_curves for value in curve if math.isfinite(value)
    ]
    if finite and yscale == "log":
        axes.set_ylim(0.7 * min(finite), 1.3 * float(np.quantile(finite, 0.99)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    name_lines(axes)
    save(figure, path)


def draw_point(axes: Axes, x: float, y: float, error: Any, name: str, style: Style) -> None:
    """One result with its interval."""
    axes.errorbar([x], [y], yerr=error, fmt=style.marker, color=style.color, capsize=4, label=name)


def save(figure: Figure, path: Path) -> None:
    """Write a picture."""
    figure.savefig(path, dpi=150, bbox_inches="tight")


# -- tables --------------------------------------------------------------------------------------
def show(shown: Table) -> None:
    """Print a table; where the output is not a terminal it is as wide as it needs to be."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=max(console.width, 120))
    console.print(fitted(shown, console))


def fitted(shown: Table, console: Console) -> RenderableType:
    """The table itself; where the console is too narrow, its columns in several tables with the same rows."""
    named = list(takewhile(lambda column: column.justify == "left", shown.columns))
    parts = [named]
    for column in shown.columns[len(named) :]:
        wider = [*parts[-1], column]
        if parts[-1] is not named and _width(shown, wider, console) > console.width:
            parts.append([*named, column])
        else:
            parts[-1] = wider
    tables = [_part(shown, columns) for columns in parts]
    tables[0].title = shown.title
    tables[-1].caption = shown.caption
    return Group(*tables)


def _part(shown: Table, columns: Sequence[Column]) -> Table:
    """The table with these columns only."""
    part = Table(box=shown.box, pad_edge=shown.pad_edge, title_justify=shown.title_justify)
    for column in columns:
        part.add_column(column.header, justify=column.justify)
    for cells, row in zip(zip(*[column.cells for column in columns], strict=True), shown.rows, strict=True):
        part.add_row(*cells, style=row.style)
    return part


def _width(shown: Table, columns: Sequence[Column], console: Console) -> int:
    endless = console.options.update(width=10_000)
    return console.measure(_part(shown, columns), options=endless).maximum
