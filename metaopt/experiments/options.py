"""The options of the command line, each with its check; what is wrong is told before work begins."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from metaopt.experiments.image_data import SOURCES


def number(low: float, high: float = math.inf) -> Callable[[float | None], float | None]:
    """A check that a number is finite and lies in [low, high]."""

    def check(value: float | None) -> float | None:
        if value is None or (low <= value <= high and math.isfinite(value)):
            return value
        limits = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
        raise typer.BadParameter(f"a finite number {limits} is wanted, got {value:g}")

    return check


def source_name(name: str) -> str:
    """A check that there is such a data set."""
    if name not in SOURCES:
        raise typer.BadParameter(f"no data is called {name!r}; there are {', '.join(SOURCES)}")
    return name


def output_folder(out: Path) -> Path:
    """A check that a folder is there, or can be made, and that files can be written to it."""
    try:
        nearest = next(place for place in (out, *out.absolute().parents) if place.exists())
    except OSError as error:
        raise typer.BadParameter(f"{out} cannot be a folder: {error.strerror}") from error
    if not nearest.is_dir():
        raise typer.BadParameter(f"{nearest} is a file; a folder is wanted")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise typer.BadParameter(f"{nearest} cannot be written to")
    return out


def state_file(path: Path | None) -> Path | None:
    """A check that there is such a file."""
    if path is not None and not path.is_file():
        raise typer.BadParameter(f"there is no file {path}")
    return path


Estimators = Annotated[
    str | None, typer.Option(help="Comma-separated keys, listed below; default: all of them, or the paper's.")
]
Seeds = Annotated[int, typer.Option(min=1, max=9_999, help="Independent runs of every method.")]
Seed = Annotated[int, typer.Option(min=0, max=9_999, help="Of the network and the tasks.")]
Out = Annotated[
    Path,
    typer.Option(
        callback=output_folder,
        help="Folder for the pictures and the JSON of every run; the same folder again goes on there.",
    ),
]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes; default: one per core.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the settings, the runs and the files; do nothing.")]
Data = Annotated[str, typer.Option(callback=source_name, help=f"One of {', '.join(SOURCES)}.")]
Root = Annotated[Path, typer.Option(help="Where the data set's files are (or, for folder, the folder).")]
Size = Annotated[int | None, typer.Option(min=8, max=512, help="Height and width to work at; default: the profile's.")]
Shots = Annotated[
    int | None, typer.Option(min=1, help="Training images of a class, and as many test images; default: the profile's.")
]
Ways = Annotated[int | None, typer.Option(min=2, help="Classes of a task; default: the profile's, 10.")]
Small = Annotated[
    bool, typer.Option("--small", help="For two cores: 14×14 pixels, 16 channels, 50 shots, 10 inner runs.")
]
Download = Annotated[bool, typer.Option("--download", help="Fetch the data set's files where they are missing.")]
Iterations = Annotated[
    int | None, typer.Option(min=1, max=999_999, help="Inner runs of meta-training (M); default: the profile's.")
]
Fomaml = Annotated[bool, typer.Option("--fomaml", help="FOMAML instead of Reptile for the initial weights (table 6).")]
Stable = Annotated[
    bool,
    typer.Option(
        "--stable/--printed", help="Bound the hypergradient's norm by 1 and hold the momentum constant in A, for all."
    ),
]
Problems = Annotated[int, typer.Option(min=1, max=999, help="Meta-batches of new tasks at each stage.")]
Every = Annotated[int, typer.Option(min=1, help="Inner steps between two comparisons along a run.")]
