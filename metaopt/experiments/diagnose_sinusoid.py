"""Figures 3 and 4 of the HyperDistill paper on the sinusoid experiment.

Before meta-training, and after M inner runs of it.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from metaopt.estimators import IFT, DrMAD, Estimator, FirstOrder, HyperDistill, OneStep
from metaopt.experiments.diagnose import Stage, diagnose
from metaopt.experiments.sinusoid import REFITTED, Setup, SinusoidConfig, meta_task, setup
from metaopt.linsolve import Neumann
from metaopt.meta import MetaTraining, OuterOptimizer, Reptile, replicated
from metaopt.problem import Problem
from metaopt.tree import Tree

METHODS: dict[str, Estimator] = {
    "FO": FirstOrder(),
    "1-step": OneStep(),
    "N.IFT(10, 1)": IFT(Neumann(10, rate=0.01), converged=None, solved=None),
    "DrMAD": DrMAD(),
}
"""The methods of figure 3, besides HyperDistill."""

_NEW_TASKS = 20_000
"""Numbers of the runs whose tasks are diagnosed; meta-training draws others."""


def run(
    config: SinusoidConfig, out: Path, *, problems: int = 4, every: int = 5, gamma: float = 0.9, seed: int = 0
) -> list[Stage]:
    """Meta-train with re-fitted HyperDistill, diagnose both ends, write the figures.

    Deterministic in its arguments.

    Args:
        config: of the experiment; the true derivative of momentum SGD is used throughout.
        out: folder.
        problems: meta-batches of new tasks at each stage, besides the one that θ is fitted to.
        every: inner steps between two looks; the first step and the last are always looked at.
        gamma: of HyperDistill.
        seed: of the network and of the tasks.
    """
    config = replace(config, **REFITTED)
    distill = HyperDistill(gamma=gamma)
    start = setup(config, seed)
    phi, lam, thetas = train(start, config, distill, seed)
    stages = {
        "before meta-training": [
            problem(start, config, seed, start.phi, start.lam, number) for number in range(problems + 1)
        ],
        f"after {config.meta_iterations} runs": [
            problem(start, config, seed, phi, lam, number) for number in range(problems + 1)
        ],
    }
    at = sorted({1, config.horizon, *range(every, config.horizon + 1, every)})
    return diagnose(stages, METHODS, distill, out, at=at, thetas=thetas)


def train(start: Setup, config: SinusoidConfig, distill: HyperDistill, seed: int) -> tuple[Tree, Tree, list[float]]:
    """``(φ, λ)`` after M runs, and θ in each of them."""
    outer = OuterOptimizer(
        start.lam, functools.partial(torch.optim.Adam, lr=config.outer_lr), clip_norm=config.clip_norm
    )
    training = MetaTraining(
        start.step,
        start.outer_loss,
        distill,
        config.horizon,
        initialisation=Reptile(rate=1.0),
        calibration_period=config.calibration_period,
    )
    phi = start.phi
    thetas = []
    runs = training.runs(phi, outer, functools.partial(meta_task, config, seed), config.meta_iterations)
    for report in tqdm(runs, desc="meta-training", total=config.meta_iterations, unit="run"):
        phi = report.phi
        assert isinstance(report.estimator, HyperDistill)
        thetas.append(report.estimator.theta)
    return phi, outer.lam, thetas


def problem(start: Setup, config: SinusoidConfig, seed: int, phi: Tree, lam: Tree, number: int) -> Problem:
    """The stacked problem of one meta-batch of new tasks."""
    task = meta_task(config, seed, _NEW_TASKS + number)
    batches = [task.batches[t] if not callable(task.batches) else task.batches(t + 1) for t in range(config.horizon)]
    outer_batch = task.outer_batches(config.horizon) if callable(task.outer_batches) else task.outer_batches[-1]
    return Problem(
        start.step, start.outer_loss, replicated(phi, task.tasks), lam, batches, outer_batch, name="sinusoid"
    )
