"""What the many-shot experiments show.

Tables 2, 3, 6 and figures 2, 4-7, 11-13 of the HyperDistill paper, as far as the runs go.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.table import Table

from metaopt.estimators import HyperDistill
from metaopt.experiments import compare
from metaopt.experiments.many_shot import ManyShotRun, build
from metaopt.experiments.many_shot_settings import PAPER_COLUMNS, ManyShotConfig, Method
from metaopt.experiments.statistics import summarise
from metaopt.models import MetaWeightNet


def table(methods: Sequence[Method], runs: Sequence[ManyShotRun], config: ManyShotConfig, title: str) -> Table:
    """One row per method: meta-test accuracy over seeds, cost, the paper's accuracy (on its own data)."""
    shown = Table(
        title=title,
        caption="mean ± 95 % CI over the seeds that did not fail; paper: TinyImageNet (ANIL), CIFAR100 (the others)",
    )
    for column in ("method", "accuracy, %", "failed", "products / run", "s / run", "paper"):
        shown.add_column(column, justify="left" if column == "method" else "right")
    for method in methods:
        mine = [run for run in runs if run.method == method.key]
        summary = summarise([100 * run.accuracy for run in mine])
        shown.add_row(
            method.title,
            summary.interval(),
            f"{summary.failed}/{len(mine)}",
            f"{np.mean([run.products for run in mine]):.0f}",
            f"{np.median([run.seconds for run in mine]):.1f}",
            method.paper[PAPER_COLUMNS.index(config.model)],
        )
    return shown


def draw(methods: Sequence[Method], runs: Sequence[ManyShotRun], config: ManyShotConfig, out: Path) -> list[Path]:
    """Every picture that the runs allow; returns the files."""
    of = {method.title: [run for run in runs if run.method == method.key] for method in methods}
    paths = [out / "convergence.png"]
    compare.draw_curves(
        {title: [run.curve for run in mine] for title, mine in of.items()},
        paths[-1],
        ylabel=f"outer loss after T = {config.horizon}",
    )
    if any(run.validation for run in runs):
        paths.append(out / "validation.png")
        curves = {
            title: [[100 * accuracy for _, accuracy in run.validation] for run in mine] for title, mine in of.items()
        }
        compare.draw_curves(
            curves, paths[-1], ylabel="meta-validation accuracy, %", every=config.validate_every, yscale="linear"
        )
    if any(run.theta for run in runs):
        paths.append(out / "theta.png")
        fitted = {title: [run.theta for run in mine] for title, mine in of.items() if any(run.theta for run in mine)}
        compare.draw_curves(fitted, paths[-1], ylabel="θ", yscale="linear")
    paths.append(out / "cost.png")
    draw_cost(of, paths[-1])
    if sum(isinstance(method.estimator, HyperDistill) for method in methods) > 1:
        paths.append(out / "gamma.png")
        draw_gammas(methods, runs, paths[-1])
    if config.model == "meta-weight-net":
        paths.append(out / "weights.png")
        draw_weights(of, config, paths[-1])
    return paths


def draw_cost(runs: dict[str, list[ManyShotRun]], path: Path) -> None:
    """Figure 4 (e): accuracy against products per inner run."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for title, mine in runs.items():
        summary = summarise([100 * run.accuracy for run in mine])
        error = 0.0 if math.isnan(summary.half_width) else summary.half_width
        axes.errorbar(
            float(np.mean([run.products for run in mine])), summary.mean, yerr=error, fmt="o", capsize=4, label=title
        )
    axes.set(xlabel="products (αA, αB) per inner run", ylabel="meta-test accuracy, %")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=9)
    figure.savefig(path, dpi=150)


def draw_gammas(methods: Sequence[Method], runs: Sequence[ManyShotRun], path: Path) -> None:
    """Figures 6 and 11: accuracy against γ; the other methods as lines."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    swept: dict[str, list[tuple[str, float, float]]] = {}
    for method in methods:
        summary = summarise([100 * run.accuracy for run in runs if run.method == method.key])
        error = 0.0 if math.isnan(summary.half_width) else summary.half_width
        if isinstance(method.estimator, HyperDistill):
            swept.setdefault(method.title.split(", γ")[0], []).append(
                (f"{method.estimator.gamma:g}", summary.mean, error)
            )
        else:
            axes.axhline(summary.mean, linestyle="--", alpha=0.7, color=f"C{len(axes.lines) + 2}", label=method.title)
    for title, points in swept.items():
        gammas, means, errors = zip(*sorted(points, key=lambda point: float(point[0])), strict=True)
        axes.errorbar(gammas, means, yerr=errors, fmt="o-", capsize=4, label=title)
    axes.set(xlabel="γ", ylabel="meta-test accuracy, %")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=9)
    figure.savefig(path, dpi=150)


def draw_weights(runs: dict[str, list[ManyShotRun]], config: ManyShotConfig, path: Path) -> None:
    """Figure 7: the learned weight of an example against its loss, one curve per seed."""
    model: Any = build(config, torch.Size((1, config.source.size or 28, config.source.size or 28)))
    assert isinstance(model, MetaWeightNet)
    losses = torch.linspace(0, 6, 200)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (title, mine) in enumerate(runs.items()):
        for i, run in enumerate(mine):
            with torch.no_grad():
                axes.plot(losses, model.weights(run.lam, losses), color=f"C{number}", label=title if i == 0 else None)
    axes.set(xlabel="loss of an example", ylabel="its weight")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=9)
    figure.savefig(path, dpi=150)
