"""Online hyperparameter meta-learning on sinusoids: appendix G, table 4 and figure 8 of the HyperDistill paper.

ANIL on a 1-100-100-100-1 ReLU network: the first three layers are hyperparameters, the last one
adapts for T = 30 steps of momentum SGD on 10 points. λ follows Adam, the initial weights Reptile.
Table 4 reports the test error after M = 30 inner runs.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from rich.table import Table

from metaopt.estimators import IFT, RMD, DrMAD, FirstOrder, HyperDistill, OneStep
from metaopt.estimators.outer import OuterLoss
from metaopt.experiments.experiment import Experiment, Method, Run
from metaopt.experiments.pictures import draw_curves
from metaopt.experiments.statistics import summarise
from metaopt.inner import ConstantSlots, Step, inner_step
from metaopt.linsolve import Neumann
from metaopt.meta import HyperSteps, MetaTask, MetaTraining, OuterOptimizer, Reptile, replicated, vmapped
from metaopt.models import ANIL, sinusoid_net
from metaopt.optim import SGD
from metaopt.tasks import Sinusoid
from metaopt.tree import Tree

PRINTED = {"clip_norm": None, "constant_momentum": False}
"""Exactly as the papers print it: the true derivative of momentum SGD, no clipping, θ fitted every 50 runs."""

REFITTED = {"constant_momentum": False, "calibration_period": 1}
"""Ours: the true derivative of momentum SGD, and θ fitted again before every run, so that it does not go stale."""

METHODS = (
    Method("fo", "FO", FirstOrder(), paper=".567 ± .193"),
    Method("one-step", "1-step", OneStep(), paper=".670 ± .283"),
    Method("drmad", "DrMAD", DrMAD(), paper="1.086 ± .176"),
    Method("drmad-printed", "DrMAD, as printed", DrMAD(), paper="1.086 ± .176", settings=PRINTED),
    Method(
        "ift-5-5",
        "N.IFT(5, 5)",
        IFT(Neumann(5, rate=0.01), converged=None, solved=None),
        settings={"hyper_steps": HyperSteps(last=5)},
        paper=".502 ± .146",
    ),
    Method(
        "ift-2-10",
        "N.IFT(2, 10)",
        IFT(Neumann(2, rate=0.01), converged=None, solved=None),
        settings={"hyper_steps": HyperSteps(last=10)},
        paper=".502 ± .146",
    ),
    Method("hyperdistill", "HyperDistill, γ=.9", HyperDistill(gamma=0.9), paper=".327 ± .052"),
    Method(
        "hyperdistill-printed",
        "HyperDistill, as printed, γ=.99",
        HyperDistill(gamma=0.99),
        paper=".327 ± .052",
        settings=PRINTED,
    ),
    Method(
        "hyperdistill-refitted",
        "HyperDistill, θ re-fitted",
        HyperDistill(gamma=0.9),
        settings=REFITTED,
    ),
    Method("rmd", "RMD (exact), offline", RMD(), settings=PRINTED),
)


@dataclass(frozen=True)
class SinusoidConfig:
    """Settings; the defaults are the paper's, with the two common options that keep every method stable.

    Attributes:
        meta_iterations: M, inner runs of meta-training.
        horizon: T, inner steps of a run.
        meta_batch: tasks of a run.
        shots: training points (and test points) of a task.
        inner_lr: learning rate of the inner SGD.
        momentum: its momentum.
        outer_lr: Adam's learning rate for λ.
        clip_norm: bound on the norm of each hypergradient (summed over the meta-batch); ``None``:
            no clipping.
        constant_momentum: hold the momentum buffer constant in A (see
            :class:`metaopt.inner.ConstantSlots`).
        calibration_period: runs between fits of HyperDistill's θ.
        hyper_steps: when λ moves, for the methods that move it during the run.
        test_tasks: tasks of the meta-test.
    """

    meta_iterations: int = 30
    horizon: int = 30
    meta_batch: int = 10
    shots: int = 10
    inner_lr: float = 0.01
    momentum: float = 0.9
    outer_lr: float = 1e-3
    clip_norm: float | None = 1.0
    constant_momentum: bool = True
    calibration_period: int = 50
    hyper_steps: HyperSteps = HyperSteps()
    test_tasks: int = 1000

    FAILED_AT: ClassVar[float] = 3.0
    """A run whose test error is this large (or NaN) has failed."""

    @property
    def options(self) -> str:
        """The common options, in words."""
        clipping = "no clipping" if self.clip_norm is None else f"hypergradient norm at most {self.clip_norm:g}"
        momentum = "held constant in A" if self.constant_momentum else "differentiated"
        return f"{clipping}, momentum {momentum}, calibration every {self.calibration_period} runs"


@dataclass(frozen=True, kw_only=True)
class SinusoidRun(Run):
    """One meta-training run of one method, and its meta-test; ``seconds`` are per inner run.

    Attributes:
        test_error: mean squared error over the test tasks; NaN if the run broke off.
        curve: outer loss per task at the end of each inner run.
        products: αA and αB products per inner run, calibration spread over the runs.
    """

    test_error: float
    curve: list[float]
    products: float


class Setup(NamedTuple):
    """The stacked bilevel problem without its tasks.

    The model, Φ, the outer loss, initial weights of one task, and λ.
    """

    anil: ANIL
    step: Step
    outer_loss: OuterLoss
    phi: Tree
    lam: Tree


def setup_of(_: Method, config: SinusoidConfig, seed: int) -> Setup:
    """The network of one seed, the same for every method."""
    return setup(config, seed)


def setup(config: SinusoidConfig, seed: int) -> Setup:
    """The network of one seed, split into weights and hyperparameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        anil = ANIL.of(sinusoid_net(), torch.nn.functional.mse_loss, weights=["6.*"])
    phi, lam = anil.init()
    step: Step = inner_step(vmapped(anil.inner_loss), SGD(lr=config.inner_lr, momentum=config.momentum))
    if config.constant_momentum:
        step = ConstantSlots(step)
    return Setup(anil, step, vmapped(anil.outer_loss), phi, lam)


def run(method: Method, config: SinusoidConfig, seed: int) -> SinusoidRun:
    """Meta-train and meta-test once. Deterministic in ``(method, config, seed)``."""
    config = method.configured(config)
    anil, step, outer_loss, phi, lam = setup(config, seed)
    outer = OuterOptimizer(lam, functools.partial(torch.optim.Adam, lr=config.outer_lr), clip_norm=config.clip_norm)
    training = MetaTraining(
        step,
        outer_loss,
        method.moving,
        config.horizon,
        config.hyper_steps,
        Reptile(rate=1.0),
        calibration_period=config.calibration_period,
    )
    curve: list[float] = []
    products = 0
    failure = ""
    start = time.perf_counter()
    try:
        for report in training.runs(phi, outer, functools.partial(meta_task, config, seed), config.meta_iterations):
            phi = report.phi
            curve.append(report.outer_losses[-1] / config.meta_batch)
            products += report.cost.products
    except FloatingPointError as error:
        failure = str(error)
    seconds = (time.perf_counter() - start) / max(1, len(curve))
    error = math.nan if failure else test_error(anil, step, phi, outer.lam, config, seed)
    if not failure and not error < config.FAILED_AT:
        failure = f"test error {error:.3g}"
    return SinusoidRun(
        method=method.key,
        seed=seed,
        seconds=seconds,
        failure=failure,
        test_error=error,
        curve=curve,
        products=products / max(1, len(curve)),
    )


def test_error(anil: ANIL, step: Step, phi: Tree, lam: Tree, config: SinusoidConfig, seed: int) -> float:
    """Mean squared error after the same inner run on new tasks, at 100 test points each."""
    tasks = Sinusoid(config.shots, test_points=100).sample(config.test_tasks, seed=_TEST + seed)
    state = step.init(replicated(phi, config.test_tasks), lam)
    for _ in range(config.horizon):
        state = step(state, lam, tasks.train)
    with torch.no_grad():
        return float(vmapped(anil.outer_loss)(state.w, lam, tasks.test)) / config.test_tasks


test_error.__test__ = False  # type: ignore[attr-defined]  (pytest would collect it by its name)

_TEST = 1_000_000_000
_RUNS = 100_000


def meta_task(config: SinusoidConfig, seed: int, run: int) -> MetaTask:
    """Tasks of an inner run; the calibration's runs (≤ 0) draw from the upper half of the seed's range."""
    number = run if run > 0 else _RUNS // 2 - run
    tasks = Sinusoid(config.shots, config.shots).sample(config.meta_batch, seed=seed * _RUNS + number)
    return MetaTask([tasks.train] * config.horizon, [tasks.test] * config.horizon, config.meta_batch)


def table(methods: Sequence[Method], runs: Sequence[SinusoidRun], config: SinusoidConfig) -> Table:
    """One row per method.

    Median, mean ± 95 % CI, failed seeds, products and seconds per inner run, the paper's figure.
    """
    shown = Table(
        title=f"Sinusoid, meta-test error over {config.test_tasks} tasks, M = {config.meta_iterations}",
        caption="median over all seeds (a failed one counts as infinite); mean ± 95 % CI over those that did not fail",
    )
    for column in ("method", "median", "mean ± 95 % CI", "failed", "products / run", "ms / run", "paper"):
        shown.add_column(column, justify="left" if column == "method" else "right")
    for method in methods:
        mine = [run for run in runs if run.method == method.key]
        summary = summarise([run.test_error for run in mine], config.FAILED_AT)
        interval = "–" if math.isnan(summary.half_width) else f"{summary.mean:.3f} ± {summary.half_width:.3f}"
        shown.add_row(
            method.title,
            f"{summary.median:.3f}",
            interval,
            f"{summary.failed}/{len(mine)}",
            f"{np.median([run.products for run in mine]):.0f}",
            f"{1e3 * np.median([run.seconds for run in mine]):.0f}",
            method.published("sinusoid"),
        )
    return shown


def draw(methods: Sequence[Method], runs: Sequence[SinusoidRun], config: SinusoidConfig, out: Path) -> list[Path]:
    """Figure 8: the outer loss along meta-training; variants of a method share its colour."""
    curves = {method.title: [run.curve for run in runs if run.method == method.key] for method in methods}
    path = out / "convergence.png"
    draw_curves(
        curves,
        path,
        title="outer loss along meta-training",
        ylabel=f"outer loss after T = {config.horizon} inner steps",
    )
    return [path]


EXPERIMENT = Experiment("sinusoid", METHODS, SinusoidRun, setup_of, run, table, draw)
