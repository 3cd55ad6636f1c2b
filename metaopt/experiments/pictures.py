"""Pictures and tables that all experiments share."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table


def draw_curves(
    curves: Mapping[str, Sequence[Sequence[float]]],
    path: Path,
    *,
    ylabel: str,
    xlabel: str = "inner runs",
    every: int = 1,
    yscale: str = "log",
    dashed: Container[str] = (),
) -> None:
    """Median over seeds of each method's curve, with the middle half of the seeds shaded.

    Args:
        curves: title of a method -> a curve per seed; a curve that broke off counts as infinite
            from there.
        path: of the picture.
        ylabel: what the curves show.
        xlabel: what they are drawn over.
        every: distance between a curve's points.
        yscale: ``"log"`` or ``"linear"``.
        dashed: titles drawn dashed.
    """
    figure = Figure(figsize=(10, 5), layout="constrained")  # not pyplot: no backend is chosen for the user
    axes = figure.subplots()
    for colour, (title, all_curves) in zip(_COLOURS, curves.items(), strict=False):
        found = [curve for curve in all_curves if curve]
        if not found:
            continue
        length = max(len(curve) for curve in found)
        padded = np.array([[*curve, *[math.inf] * (length - len(curve))] for curve in found])
        low, middle, high = np.quantile(padded, [0.25, 0.5, 0.75], axis=0, method="nearest")
        m = every * np.arange(1, length + 1)
        axes.plot(m, middle, label=title, color=colour, linewidth=1.8, linestyle="--" if title in dashed else "-")
        axes.fill_between(m, low, np.minimum(high, 1e3), color=colour, alpha=0.12, linewidth=0)
    axes.set(xlabel=xlabel, ylabel=ylabel, yscale=yscale)
    finite = [
        value for all_curves in curves.values() for curve in all_curves for value in curve if math.isfinite(value)
    ]
    if finite and yscale == "log":
        axes.set_ylim(0.7 * min(finite), 1.3 * float(np.quantile(finite, 0.99)))
    axes.grid(alpha=0.25, which="both")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside right upper", fontsize=9)
    figure.savefig(path, dpi=150)


_COLOURS = (*colormaps["tab10"].colors, *colormaps["Dark2"].colors)  # type: ignore[attr-defined]


def show(shown: Table) -> None:
    """Print a table, wide enough where the output is not a terminal."""
    console = Console()
    Console(width=max(console.width, 120)).print(shown) if not console.is_terminal else console.print(shown)
