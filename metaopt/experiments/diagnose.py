r"""How good hypergradients are during meta-training.

Figures 3 and 4 of the HyperDistill paper, with exact RMD as the yardstick.

:func:`diagnose` takes prepared problems, so that it serves every experiment: a *stage* is a point
of meta-training with some problems drawn there. Figure 3: cosine to exact along the inner run, of
the hypergradient, equation 7 for several γ, the indirect term. Figure 4: the samples of algorithm 4
with the fitted θ, that θ against the truth on problems it was not fitted to, θ along meta-training,
error against the number of products. Lee et al. 2022, `arXiv
2110.02508 <https://arxiv.org/abs/2110.02508>`__, section 5.1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table as RichTable
from tqdm import tqdm

from metaopt.diagnose import Alignment, Costs, alignment, calibrated, costs, finished_run
from metaopt.estimators import Estimator, HyperDistill
from metaopt.estimators.hyperdistill import SizeSamples
from metaopt.experiments.decayed_sum import DecayedSum
from metaopt.experiments.pictures import OKABE_ITO, draw_line, draw_point, panels, save, styles
from metaopt.files import write_text
from metaopt.problem import Problem
from metaopt.table import Table


@dataclass(frozen=True)
class Stage:
    """What was measured at one point of meta-training.

    Attributes:
        name: of the stage.
        methods: closeness of every method, one result per problem.
        sums: the same for equation 7, by γ.
        samples: of algorithm 4, on the problem set aside for calibration.
        theta: fitted to them.
        truth: per problem, ``(x_t, y_t)`` with exact hypergradients along the run.
        expenses: cost of one hypergradient at the horizon.
    """

    name: str
    methods: tuple[Alignment, ...]
    sums: tuple[Alignment, ...]
    samples: SizeSamples
    theta: float
    truth: tuple[tuple[list[float], list[float]], ...]
    expenses: Costs


def diagnose(
    stages: Mapping[str, Sequence[Problem]],
    estimators: Mapping[str, Estimator],
    distill: HyperDistill,
    out: Path,
    *,
    gammas: Sequence[float] = (0.0, 0.5, 0.9, 0.99, 1.0),
    at: Sequence[int] | None = None,
    thetas: Sequence[float] = (),
) -> list[Stage]:
    """Measure, and write ``figure3.png``, ``figure4.png`` and ``diagnosis.json``.

    Args:
        stages: name to problems; the first problem of a stage is set aside to calibrate on, the
            others are measured.
        estimators: the methods besides HyperDistill.
        distill: HyperDistill, to be calibrated.
        out: folder, made if need be.
        gammas: of equation 7.
        at: numbers of inner steps, default 1 … T.
        thetas: θ along meta-training, for figure 4d.

    Raises:
        ValueError: for a stage with fewer than two problems.
    """
    for name, problems in stages.items():
        if len(problems) < 2:
            raise ValueError(
                f"stage {name!r} has {len(problems)} problems: one is set aside for calibration, so at least two are "
                "needed"
            )
    with tqdm(desc="diagnosis", total=sum(map(len, stages.values())), unit="problem") as bar:
        measured = [_stage(name, problems, estimators, distill, gammas, at, bar) for name, problems in stages.items()]
    out.mkdir(parents=True, exist_ok=True)
    save(figure_3(measured), out / "figure3.png")
    save(figure_4(measured, thetas), out / "figure4.png")
    plain = [_plain(stage) for stage in measured]
    write_text(out / "diagnosis.json", json.dumps(plain, indent=1, allow_nan=False) + "\n")
    return measured


def _stage(
    name: str,
    problems: Sequence[Problem],
    estimators: Mapping[str, Estimator],
    distill: HyperDistill,
    gammas: Sequence[float],
    at: Any,
    bar: Any,
) -> Stage:
    bar.set_postfix_str(f"{name}, calibration")
    aside = problems[0]
    rest = problems[1:]
    samples = distill.size_samples(aside.step, aside.lam, finished_run(aside))
    fitted = calibrated({"HyperDistill": distill}, aside)["HyperDistill"]
    assert isinstance(fitted, HyperDistill)
    methods = {**estimators, "HyperDistill": fitted}
    decayed = {f"γ = {gamma:g}": DecayedSum(gamma) for gamma in gammas}
    found = []
    sums = []
    for number, problem in enumerate(rest, start=1):
        bar.update()
        bar.set_postfix_str(f"{name}, problem {number}")
        found.append(alignment(methods, problem, at))
        sums.append(alignment(decayed, problem, at))
    truth = tuple(_truth(result, fitted.theta) for result in found)
    expenses = costs(methods, rest[0], repeats=1, memory=False)
    bar.update()
    return Stage(name, tuple(found), tuple(sums), samples, fitted.theta, truth, expenses)


def _truth(result: Alignment, theta: float) -> tuple[list[float], list[float]]:
    """``x_t = S_t ‖v_t‖`` and ``y_t = v_t · g_t / ‖v_t‖``, without the sign that θ gives to the direction."""
    t, cosine = result.curve("HyperDistill", of="indirect")
    _, ratio = result.curve("HyperDistill", of="indirect", value="norm_ratio")
    sizes = [result.exact_norms[i][1] for i in t]
    x = [r * size / abs(theta) for r, size in zip(ratio, sizes, strict=True)]
    return x, [float(np.sign(theta)) * c * size for c, size in zip(cosine, sizes, strict=True)]


POINTS = OKABE_ITO[0]
FITTED = OKABE_ITO[1]
"""Of measured points, and of the line through them."""


# -- pictures ------------------------------------------------------------------------------------
def figure_3(stages: Sequence[Stage]) -> Figure:
    """One row per stage: median over its problems, the middle half shaded."""
    figure, grid = panels(13, 3.8 * len(stages), len(stages), 3)
    for axes, stage in zip(grid, stages, strict=True):
        _band(axes[0], stage.methods, "total")
        axes[0].set_title(f"hypergradient, {stage.name}", fontsize="medium")
        _band(axes[1], stage.sums, "indirect", gradual=True)
        axes[1].set_title("indirect term, equation 7", fontsize="medium")
        _band(axes[2], stage.methods, "indirect")
        axes[2].set_title("indirect term, methods", fontsize="medium")
        for panel in axes:
            panel.set(xlabel="inner steps t", ylim=(min(panel.get_ylim()[0], 0.9), 1.03))
            panel.legend(fontsize="small", loc="lower left")
        axes[0].set_ylabel("cosine to exact RMD")
    return figure


def _band(axes: Any, results: Sequence[Alignment], of: str, *, gradual: bool = False) -> None:
    names = list(dict.fromkeys(point.estimator for point in results[0].points))
    style = styles(names)
    for place, name in enumerate(names):
        curves = np.array([result.curve(name, of=of)[1] for result in results])
        if np.isnan(curves).all():  # first-order has no indirect term
            continue
        low, middle, high = np.nanquantile(curves, [0.25, 0.5, 0.75], axis=0)
        colour = _gradual(place / max(1, len(names) - 1)) if gradual else style[name].color
        t = results[0].curve(name)[0]
        draw_line(axes, t, middle, label=name, color=colour)
        axes.fill_between(t, low, high, color=colour, alpha=0.13, linewidth=0)


def _gradual(place: float) -> Any:
    """From dark to light, for a number instead of a method."""
    return colormaps["viridis"](0.9 * place)


def figure_4(stages: Sequence[Stage], thetas: Sequence[float] = ()) -> Figure:
    """Calibration samples of every stage, θ against the truth, θ along meta-training, error against products."""
    figure, grid = panels(13, 7.6, 2, 3)
    free = iter(grid.flat)
    for stage in (stages[0], stages[-1])[: len(stages)]:
        _samples(next(free), stage)
    _against_truth(next(free), stages[-1])
    if thetas:
        axes = next(free)
        axes.plot(range(1, len(thetas) + 1), thetas, ".-", color=POINTS)
        axes.axhline(0.0, color="grey", linewidth=0.8)
        axes.set_title("θ, fitted before every run", fontsize="medium")
        axes.set(xlabel="inner runs of meta-training", ylabel="θ")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for value, label in (("relative_error", "‖g − g*‖ / ‖g*‖"), ("cosine", "cosine to exact RMD")):
        _against_products(next(free), stages[-1], value, label)
    for unused in free:
        figure.delaxes(unused)
    return figure


def _samples(axes: Any, stage: Stage) -> None:
    x = stage.samples.x.numpy()
    y = stage.samples.y.numpy()
    points = axes.scatter(x, y, c=np.arange(1, len(x) + 1), s=18, cmap="viridis")
    axes.axline((0.0, 0.0), slope=stage.theta, color=FITTED, label=f"θ = {stage.theta:.3g}")
    axes.figure.colorbar(points, ax=axes, label="horizon s")
    axes.set_title(f"algorithm 4, {stage.name}", fontsize="medium")
    axes.set(xlabel="$x_s$", ylabel="$y_s$")
    axes.legend(fontsize="small")


def _against_truth(axes: Any, stage: Stage) -> None:
    for number, (x, y) in enumerate(stage.truth):
        axes.plot(x, y, ".", markersize=4, color=POINTS, alpha=0.6, label="exact, other tasks" if number == 0 else None)
    axes.axline((0.0, 0.0), slope=stage.theta, color=FITTED, label=f"fitted θ = {stage.theta:.3g}")
    axes.set_title(f"θ against the truth, {stage.name}", fontsize="medium")
    axes.set(xlabel="$S_t \\|v_t\\|$", ylabel="$v_t \\cdot g_t / \\|v_t\\|$")
    axes.legend(fontsize="small")


def _against_products(axes: Any, stage: Stage, value: str, label: str) -> None:
    style = styles([expense.estimator for expense in stage.expenses.expenses])
    for expense in stage.expenses.expenses:
        last = [result.curve(expense.estimator, value=value)[1][-1] for result in stage.methods]
        low, middle, high = np.quantile(last, [0.25, 0.5, 0.75])
        products = expense.work.products
        name = expense.estimator
        draw_point(axes, products, middle, [[middle - low], [high - middle]], name, style[name])
    axes.set_xscale("symlog", linthresh=1)
    axes.set_title(f"{label}, {stage.name}", fontsize="medium")
    axes.set(xlabel="products for one hypergradient at t = T", ylabel=label)
    axes.legend(fontsize="small")


def _plain(stage: Stage) -> dict[str, Any]:
    """Everything in the pictures, as JSON."""
    return {
        "stage": stage.name,
        "theta": stage.theta,
        "samples": {"x": stage.samples.x.tolist(), "y": stage.samples.y.tolist()},
        "truth": [{"x": x, "y": y} for x, y in stage.truth],
        "methods": [result.as_dict() for result in stage.methods],
        "equation 7": [result.as_dict() for result in stage.sums],
        "costs": stage.expenses.as_dict(),
    }


def summary(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """Per stage and method.

    Median cosine over problems at the last t, and its mean along the run, with the products it
    took.
    """
    rows = []
    for stage in stages:
        for expense in stage.expenses.expenses:
            total = np.array([result.curve(expense.estimator)[1] for result in stage.methods])
            error = np.array([result.curve(expense.estimator, value="relative_error")[1] for result in stage.methods])
            rows.append(
                {
                    "stage": stage.name,
                    "method": expense.estimator,
                    "cosine, mean over t": float(np.median(total.mean(1))),
                    "cosine at T": float(np.median(total[:, -1])),
                    "relative error at T": float(np.median(error[:, -1])),
                    "products": expense.work.products,
                }
            )
    return rows


def table(stages: Sequence[Stage], title: str) -> RichTable:
    """:func:`summary`, to print."""
    rows = summary(stages)
    return Table(title, tuple(rows[0]), tuple([tuple(row.values()) for row in rows])).rich()
