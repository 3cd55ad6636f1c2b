"""What the experiment with noisy labels shows.

Accuracies against the frozen weight net, and the learned weighting curves (figure 7).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from metaopt.experiments import noisy_labels
from metaopt.experiments.experiment import Experiment, Method
from metaopt.experiments.noisy_labels import BINS, HIGHEST_LOSS, METHODS, NoisyLabelsConfig, NoisyLabelsRun
from metaopt.experiments.pictures import RIGHT, WRONG, draw_curves, draw_line, panels, save, styles
from metaopt.experiments.statistics import summarise

CONTROL = "frozen"
"""Key of the method that the others are held against."""


def table(methods: Sequence[Method], runs: Sequence[NoisyLabelsRun], config: NoisyLabelsConfig) -> Table:
    """One row per method.

    Accuracy, its gain over the frozen net on the same seeds, the second stage, and the weights'
    ratio.
    """
    shown = Table(
        title=f"Fashion-MNIST, {config.rate:.0%} wrong labels",
        caption="mean ± 95 % CI over the seeds that did not fail; gain: over the frozen random net, seed by seed",
    )
    for column in ("method", "accuracy, %", "gain", "two stages, %", "weight right / wrong", "failed", "s / run"):
        shown.add_column(column, justify="left" if column == "method" else "right")
    control = {run.seed: run.accuracy for run in runs if run.method == CONTROL}
    for method in methods:
        mine = [run for run in runs if run.method == method.key]
        gains = [run.accuracy - control[run.seed] for run in mine if run.seed in control and method.key != CONTROL]
        moved = [run.two_stage for run in mine if method.estimator is not None]
        summary = summarise([run.accuracy for run in mine])
        shown.add_row(
            method.title,
            summary.interval(),
            summarise(gains).interval() if gains else "–",
            summarise(moved).interval() if moved else "–",
            summarise([run.ratio for run in mine]).interval(),
            f"{summary.failed}/{len(mine)}",
            f"{np.median([run.seconds for run in mine]):.1f}",
        )
    return shown


def draw(methods: Sequence[Method], runs: Sequence[NoisyLabelsRun], config: NoisyLabelsConfig, out: Path) -> list[Path]:
    """Accuracy along training, and the weighting curves; returns the files."""
    paths = [out / "accuracy.png", out / "weights.png"]
    curves = {method.title: [run.curve for run in runs if run.method == method.key] for method in methods}
    draw_curves(
        curves,
        paths[0],
        title="test accuracy along training",
        ylabel="test accuracy, %",
        xlabel="steps",
        every=config.evaluate_every,
        yscale="linear",
    )
    draw_weights(methods, runs, paths[1])
    return paths


def draw_weights(methods: Sequence[Method], runs: Sequence[NoisyLabelsRun], path: Path) -> None:
    """Figure 7, a column for each method.

    The weight of an example against its loss, one curve per seed; below, where the losses lie.
    """
    figure, grid = panels(2.6 * len(methods), 4.6, 2, len(methods), sharex=True, sharey="row")
    figure.suptitle(
        "weight of an example against its loss, one line per seed; below: where the losses lie", fontsize=11
    )
    style = styles([method.title for method in methods])
    losses = np.linspace(0, HIGHEST_LOSS, BINS)
    edges = np.linspace(0, HIGHEST_LOSS, BINS + 1)
    for (above, below), method in zip(grid.T, methods, strict=True):
        mine = [run for run in runs if run.method == method.key]
        for run in mine:
            draw_line(above, losses, run.weights, color=style[method.title].color)
        for label, colour, found in (
            ("right label", RIGHT, [run.right_losses for run in mine]),
            ("wrong label", WRONG, [run.wrong_losses for run in mine]),
        ):
            below.stairs(np.mean(found, axis=0), edges, color=colour, fill=True, alpha=0.5, label=label)
        ratio = summarise([run.ratio for run in mine]).mean
        above.set(title=method.title, ylim=(0, 1.03))
        above.title.set_fontsize(9)
        below.set(xlabel="loss of an example", yscale="log")
        if math.isfinite(ratio):
            above.text(
                0.97, 0.95, f"right / wrong {ratio:.3g}", transform=above.transAxes, ha="right", va="top", fontsize=8
            )
    grid[0, 0].set_ylabel("its weight")
    grid[1, 0].set_ylabel("training images")
    grid[1, 0].legend(fontsize=8)
    save(figure, path)


EXPERIMENT = Experiment("noisy-labels", METHODS, NoisyLabelsRun, noisy_labels.prepare, noisy_labels.run, table, draw)
