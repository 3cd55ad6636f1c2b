"""Running a table of methods over seeds, and showing what came out: a table, a picture, a JSON of every run."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from metaopt.experiments.statistics import summarise

Run = TypeVar("Run")


def select(methods: Sequence[Any], keys: Sequence[str] | None) -> list[Any]:
    """The methods with these keys, in the table's order; all of them for ``None``.

    Raises:
        ValueError: if a key is unknown.
    """
    known = [method.key for method in methods]
    unknown = [key for key in keys or [] if key not in known]
    if unknown:
        raise ValueError(f"no estimator is called {', '.join(unknown)}; there are {', '.join(known)}")
    return [method for method in methods if keys is None or method.key in keys]


def run_all(
    run: Callable[..., Any], methods: Sequence[Any], config: Any, seeds: int, *, workers: int | None = None
) -> list[Any]:
    """``run(method, config, seed)`` for every method and seed, in parallel processes of one thread each, with a progress bar.

    Returns:
        The runs, by method and then by seed.
    """
    if seeds < 1:
        raise ValueError(f"at least one seed is needed, got {seeds}")
    jobs = [(method, seed) for seed in range(seeds) for method in methods]
    workers = workers or os.cpu_count() or 1
    results = {}
    with ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        futures = {pool.submit(run, method, config, seed): (method.key, seed) for method, seed in jobs}
        with tqdm(total=len(jobs), desc="runs", unit="run") as bar:
            try:
                for future in as_completed(futures):
                    results[futures[future]] = future.result()
                    bar.set_postfix_str(f"{futures[future][0]}, seed {futures[future][1]}")
                    bar.update()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # the error is told now, not after all the other runs
                raise
    return [results[method.key, seed] for method in methods for seed in range(seeds)]


def once(run: Callable[..., Run], kind: type[Run], folder: Path, method: Any, config: Any, seed: int) -> Run:
    """``run(method, config, seed)``, or what an earlier call found.

    Each run is kept in ``folder`` as soon as it has ended.

    Args:
        run: the experiment.
        kind: the named tuple that it returns, of plain numbers, strings and lists.
        folder: where the runs are kept, one JSON file each.
        method: the row; its ``repr`` must say what it is, in every process.
        config: the settings, a dataclass.
        seed: the seed.

    Raises:
        ValueError: if the folder holds that run with other settings.
    """
    path = folder / f"{method.key}-{seed}.json"
    settings = json.loads(json.dumps({"method": repr(method), **asdict(config)}, default=str))
    if path.exists():
        found = json.loads(path.read_text())
        different = [key for key, value in settings.items() if found["settings"].get(key) != value]
        if different:
            raise ValueError(
                f"{path} holds a run with other settings ({', '.join(different)}); choose another --out, or remove it"
            )
        return kind(**found["run"])
    result = run(method, config, seed)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    unfinished.write_text(json.dumps({"settings": settings, "run": result._asdict()}) + "\n")  # type: ignore[attr-defined]
    os.replace(unfinished, path)  # a kill at any moment leaves a whole file or none
    return result


def table(methods: Sequence[Any], runs: Sequence[Any], failed_at: float, title: str) -> Table:
    """One row per method.

    Median, mean ± 95 % CI, failed seeds, products and seconds per inner run, the paper's figure.
    """
    shown = Table(
        title=title,
        caption="median over all seeds (a failed one counts as infinite); mean ± 95 % CI over those that did not fail",
    )
    for column in ("method", "median", "mean ± 95 % CI", "failed", "products / run", "ms / run", "paper"):
        shown.add_column(column, justify="left" if column == "method" else "right")
    for method in methods:
        mine = [run for run in runs if run.method == method.key]
        summary = summarise([run.test_error for run in mine], failed_at)
        interval = "–" if math.isnan(summary.half_width) else f"{summary.mean:.3f} ± {summary.half_width:.3f}"
        shown.add_row(
            method.title,
            f"{summary.median:.3f}",
            interval,
            f"{summary.failed}/{len(mine)}",
            f"{np.median([run.products for run in mine]):.0f}",
            f"{1e3 * np.median([run.seconds for run in mine]):.0f}",
            method.paper,
        )
    return shown


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


def save(runs: Sequence[Any], config: Any, path: Path) -> None:
    """Every run and the settings, as JSON (NaN and infinities as ``null``)."""
    plain = {"config": asdict(config), "runs": [_without_nan(run._asdict()) for run in runs]}
    path.write_text(json.dumps(plain, indent=1, allow_nan=False, default=str) + "\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(shown: Table) -> None:
    """Print a table, wide enough where the output is no terminal."""
    console = Console()
    Console(width=max(console.width, 120)).print(shown) if not console.is_terminal else console.print(shown)
