"""Online hyperparameter meta-learning on sinusoids: appendix G, table 4 and figure 8 of the HyperDistill paper.

ANIL on a 1-100-100-100-1 ReLU network: the first three layers are hyperparameters, the last one
adapts for T = 30 steps of momentum SGD on 10 points. λ follows Adam, the initial weights Reptile.
Table 4 reports the test error after M = 30 inner runs.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch

from metaopt.estimators import IFT, RMD, DrMAD, Estimator, FirstOrder, HyperDistill, OneStep
from metaopt.estimators.outer import OuterLoss
from metaopt.inner import ConstantSlots, Step, inner_step
from metaopt.linsolve import Neumann
from metaopt.meta import HyperSteps, MetaTask, MetaTraining, Outer, Reptile, replicated, vmapped
from metaopt.models import ANIL, sinusoid_net
from metaopt.optim import SGD
from metaopt.tasks import Sinusoid
from metaopt.tree import Tree


class Method(NamedTuple):
    """A row of the table.

    Attributes:
        key: its name on the command line.
        title: its name in the table.
        estimator: the estimator.
        hyper_steps: when λ moves (online estimators).
        paper: the paper's figure, mean ± 95 % CI over 5 runs, or "–".
        overrides: settings of :class:`SinusoidConfig` in which this row differs from the others.
    """

    key: str
    title: str
    estimator: Estimator
    hyper_steps: HyperSteps = HyperSteps()
    paper: str = "–"
    overrides: Mapping[str, Any] = {}


PRINTED = {"clip_norm": None, "constant_momentum": False}
"""Exactly as the papers print it: the true derivative of momentum SGD, no clipping, θ fitted every 50 runs."""

REFITTED = {"constant_momentum": False, "calibration_period": 1}
"""Ours: the true derivative of momentum SGD, and θ fitted anew before every run, so that it does not go stale."""

METHODS = (
    Method("fo", "FO", FirstOrder(), paper=".567 ± .193"),
    Method("one-step", "1-step", OneStep(), paper=".670 ± .283"),
    Method("drmad", "DrMAD", DrMAD(), paper="1.086 ± .176"),
    Method("drmad-printed", "DrMAD, as printed", DrMAD(), paper="1.086 ± .176", overrides=PRINTED),
    Method(
        "ift-5-5",
        "N.IFT(5, 5)",
        IFT(Neumann(5, rate=0.01), converged=None, solved=None),
        HyperSteps(last=5),
        paper=".502 ± .146",
    ),
    Method(
        "ift-2-10",
        "N.IFT(2, 10)",
        IFT(Neumann(2, rate=0.01), converged=None, solved=None),
        HyperSteps(last=10),
        paper=".502 ± .146",
    ),
    Method("hyperdistill", "HyperDistill, γ=.9", HyperDistill(gamma=0.9, example_axis=1), paper=".327 ± .052"),
    Method(
        "hyperdistill-printed",
        "HyperDistill, as printed, γ=.99",
        HyperDistill(gamma=0.99, example_axis=1),
        paper=".327 ± .052",
        overrides=PRINTED,
    ),
    Method(
        "hyperdistill-refitted",
        "HyperDistill, θ re-fitted",
        HyperDistill(gamma=0.9, example_axis=1),
        overrides=REFITTED,
    ),
    Method("rmd", "RMD (exact), offline", RMD(), overrides=PRINTED),
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
    test_tasks: int = 1000

    FAILED_AT: ClassVar[float] = 3.0
    """A run whose test error is this large (or NaN) has failed."""

    @property
    def options(self) -> str:
        """The common options, in words."""
        clipping = "no clipping" if self.clip_norm is None else f"hypergradient norm at most {self.clip_norm:g}"
        momentum = "held constant in A" if self.constant_momentum else "differentiated"
        return f"{clipping}, momentum {momentum}, calibration every {self.calibration_period} runs"


class SinusoidRun(NamedTuple):
    """One meta-training run of one method, and its meta-test.

    Attributes:
        method: key of the method.
        seed: of the initial weights and of all tasks.
        test_error: mean squared error over the test tasks; NaN if the run broke off.
        curve: outer loss per task at the end of each inner run.
        products: αA and αB products per inner run, calibration spread over the runs.
        seconds: per inner run, mean.
        failure: what went wrong, or "".
    """

    method: str
    seed: int
    test_error: float
    curve: list[float]
    products: float
    seconds: float
    failure: str


class Setup(NamedTuple):
    """The stacked bilevel problem without its tasks.

    The model, Φ, the outer loss, initial weights of one task, and λ.
    """

    anil: ANIL
    step: Step
    outer_loss: OuterLoss
    phi: Tree
    lam: Tree


def setup(config: SinusoidConfig, seed: int) -> Setup:
    """The network of one seed, split into weights and hyperparameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        anil = ANIL.of(sinusoid_net(), weights=["6.*"], loss=torch.nn.functional.mse_loss)
    phi, lam = anil.init()
    step: Step = inner_step(vmapped(anil.inner_loss), SGD(lr=config.inner_lr, momentum=config.momentum))
    if config.constant_momentum:
        step = ConstantSlots(step)
    return Setup(anil, step, vmapped(anil.outer_loss), phi, lam)


def run(method: Method, config: SinusoidConfig, seed: int) -> SinusoidRun:
    """Meta-train and meta-test once. Deterministic in ``(method, config, seed)``."""
    config = replace(config, **method.overrides)
    anil, step, outer_loss, phi, lam = setup(config, seed)
    outer = Outer(lam, functools.partial(torch.optim.Adam, lr=config.outer_lr), clip_norm=config.clip_norm)
    training = MetaTraining(
        step,
        outer_loss,
        method.estimator,
        config.horizon,
        method.hyper_steps,
        Reptile(rate=1.0),
        calibration_period=config.calibration_period,
    )
    curve, products, failure = [], 0, ""
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
    return SinusoidRun(method.key, seed, error, curve, products / max(1, len(curve)), seconds, failure)


def test_error(anil: ANIL, step: Step, phi: Tree, lam: Tree, config: SinusoidConfig, seed: int) -> float:
    """Mean squared error after the same inner run on new tasks, at 100 test points each."""
    tasks = Sinusoid(config.shots, test_points=100).sample(config.test_tasks, seed=_TEST + seed)
    state = step.init(replicated(phi, config.test_tasks), lam)
    for _ in range(config.horizon):
        state = step(state, lam, tasks.train)
    with torch.no_grad():
        return float(vmapped(anil.outer_loss)(state.w, lam, tasks.test)) / config.test_tasks


test_error.__test__ = False  # type: ignore[attr-defined]  (its name is no test's)

_TEST = 1_000_000_000
_RUNS = 100_000


def meta_task(config: SinusoidConfig, seed: int, run: int) -> MetaTask:
    """Tasks of an inner run; the calibration's runs (≤ 0) draw from the upper half of the seed's range."""
    number = run if run > 0 else _RUNS // 2 - run
    tasks = Sinusoid(config.shots, config.shots).sample(config.meta_batch, seed=seed * _RUNS + number)
    return MetaTask([tasks.train] * config.horizon, [tasks.test] * config.horizon, config.meta_batch)
