"""What the many-shot experiments show.

Tables 2, 3, 6 and figures 2, 4-7, 11-13 of the HyperDistill paper, as far as the runs go.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from metaopt.estimators import HyperDistill
from metaopt.experiments import many_shot
from metaopt.experiments.experiment import Experiment, Method
from metaopt.experiments.many_shot import LOSSES, ManyShotRun
from metaopt.experiments.many_shot_settings import METHODS, PAPERS_DATA, ManyShotConfig
from metaopt.experiments.pictures import draw_curves, draw_line, draw_point, panels, save, styles
from metaopt.experiments.statistics import summarise


def table(methods: Sequence[Method], runs: Sequence[ManyShotRun], config: ManyShotConfig) -> Table:
    """One row per method: meta-test accuracy over seeds, cost, and on the paper's data its accuracy."""
    title = (
        f"{config.model} on {config.source.name}, {config.test_tasks} test tasks, "
        f"M = {config.meta_iterations}, T = {config.horizon}"
    )
    published = config.source.name == PAPERS_DATA[config.model]
    shown = Table(title=title, caption="mean ± 95 % CI over the seeds that did not fail")
    columns = ("method", "accuracy, %", "failed", "products / run", "s / run")
    for column in (*columns, "paper") if published else columns:
        shown.add_column(column, justify="left" if column == "method" else "right")
    for method in methods:
        mine = [run for run in runs if run.method == method.key]
        summary = summarise([100 * run.accuracy for run in mine])
        paper = [method.published(config.model)] if published else []
        shown.add_row(
            method.title,
            summary.interval(),
            f"{summary.failed}/{len(mine)}",
            f"{np.mean([run.products for run in mine]):.0f}",
            f"{np.median([run.seconds for run in mine]):.1f}",
            *paper,
        )
    return shown


def draw(methods: Sequence[Method], runs: Sequence[ManyShotRun], config: ManyShotConfig, out: Path) -> list[Path]:
    """Every picture that the runs allow; returns the files."""
    of = {method.title: [run for run in runs if run.method == method.key] for method in methods}
    paths = [out / "convergence.png"]
    draw_curves(
        {title: [run.curve for run in mine] for title, mine in of.items()},
        paths[-1],
        title="outer loss along meta-training",
        ylabel=f"outer loss after T = {config.horizon}",
    )
    if any(run.validation for run in runs):
        paths.append(out / "validation.png")
        curves = {
            title: [[100 * accuracy for _, accuracy in run.validation] for run in mine] for title, mine in of.items()
        }
        draw_curves(
            curves,
            paths[-1],
            title="accuracy on new tasks along meta-training",
            ylabel="meta-validation accuracy, %",
            every=config.validate_every,
            yscale="linear",
        )
    if any(run.theta for run in runs):
        paths.append(out / "theta.png")
        fitted = {title: [run.theta for run in mine] for title, mine in of.items() if any(run.theta for run in mine)}
        draw_curves(fitted, paths[-1], title="the fitted θ along meta-training", ylabel="θ", yscale="linear")
    paths.append(out / "cost.png")
    draw_cost(of, paths[-1])
    if sum(isinstance(method.estimator, HyperDistill) for method in methods) > 1:
        paths.append(out / "gamma.png")
        draw_gammas(methods, runs, paths[-1])
    if config.model == "meta-weight-net":
        paths.append(out / "weights.png")
        draw_weights(of, paths[-1])
    return paths


def draw_cost(runs: dict[str, list[ManyShotRun]], path: Path) -> None:
    """Figure 4 (e): accuracy against products per inner run."""
    figure, ((axes,),) = panels(7, 4.5)
    for title, style in styles(list(runs)).items():
        mine = runs[title]
        summary = summarise([100 * run.accuracy for run in mine])
        error = 0.0 if math.isnan(summary.half_width) else summary.half_width
        draw_point(axes, float(np.mean([run.products for run in mine])), summary.mean, error, title, style)
    axes.set(
        xlabel="products (αA, αB) per inner run",
        ylabel="meta-test accuracy, %",
        title="accuracy against cost: mean and 95 % interval over seeds",
    )
    figure.legend(loc="outside right upper", fontsize=9)
    save(figure, path)


def draw_gammas(methods: Sequence[Method], runs: Sequence[ManyShotRun], path: Path) -> None:
    """Figures 6 and 11: accuracy against γ; the other methods as lines."""
    figure, ((axes,),) = panels(7, 4.5)
    style = styles([method.title for method in methods])
    swept: dict[str, list[tuple[str, float, float]]] = {}
    for method in methods:
        summary = summarise([100 * run.accuracy for run in runs if run.method == method.key])
        error = 0.0 if math.isnan(summary.half_width) else summary.half_width
        if isinstance(method.estimator, HyperDistill):
            swept.setdefault(method.title.split(", γ")[0], []).append(
                (f"{method.estimator.gamma:g}", summary.mean, error)
            )
        else:
            look = style[method.title]
            axes.axhline(summary.mean, color=look.color, linestyle=look.linestyle, alpha=0.7, label=method.title)
    for title, look in styles(list(swept)).items():
        points = swept[title]
        gammas, means, errors = zip(*sorted(points, key=lambda point: float(point[0])), strict=True)
        axes.errorbar(gammas, means, yerr=errors, **look._asdict(), capsize=4, label=title)
    axes.set(xlabel="γ", ylabel="meta-test accuracy, %", title="accuracy against HyperDistill's γ")
    figure.legend(loc="outside right upper", fontsize=9)
    save(figure, path)


def draw_weights(runs: Mapping[str, Sequence[ManyShotRun]], path: Path) -> None:
    """Figure 7: the learned weight of an example against its loss, one curve per seed."""
    figure, ((axes,),) = panels(7, 4.5)
    for title, style in styles(list(runs)).items():
        for i, run in enumerate(runs[title]):
            label = title if i == 0 else None
            draw_line(axes, LOSSES, run.weights, color=style.color, linestyle=style.linestyle, label=label)
    axes.set(xlabel="loss of an example", ylabel="its weight", title="the learned weights: one line per seed")
    figure.legend(loc="outside right upper", fontsize=9)
    save(figure, path)


EXPERIMENT = Experiment("many-shot", METHODS, ManyShotRun, many_shot.prepare, many_shot.run, table, draw, goes_on=True)
