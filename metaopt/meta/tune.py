"""Offline: many inner runs, one hypergradient after each, and λ moves by it."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from metaopt import checks, replay, tree
from metaopt.estimators._arguments import check_arguments
from metaopt.estimators.base import Estimator
from metaopt.estimators.cost import Cost, CountedStep
from metaopt.estimators.hypergradient import Batches, Hypergradient, hypergradient
from metaopt.estimators.outer import OuterLoss, outer_gradient
from metaopt.estimators.reverse import RMD
from metaopt.inner.contract import Step
from metaopt.inner.state import InnerState
from metaopt.inner.tasks import is_stacked
from metaopt.meta import checkpoint as files
from metaopt.meta._packed import described
from metaopt.meta.calibration import calibrated
from metaopt.meta.initialisation import Fixed, Initialisation
from metaopt.meta.outer_optimizer import MakesOptimizer, OuterOptimizer, Scheduler
from metaopt.meta.report import Guard, Report, Reports, peak_bytes
from metaopt.tree import Tree

Tasks: TypeAlias = Callable[[int], tuple[Batches, Any]]
"""``run -> (batches, outer_batch)``: the data of run 1, 2, …; any random numbers in it are seeded by ``run``."""


def tune(
    step: Step,
    outer_loss: OuterLoss,
    w0: Tree,
    lam: Tree,
    batches: Batches | None = None,
    outer_batch: Any = None,
    *,
    tasks: Tasks | None = None,
    estimator: Estimator = RMD(),
    optimizer: MakesOptimizer | None = None,
    runs: int = 50,
    horizon: int | None = None,
    initial: Initialisation = Fixed(),
    scheduler: Scheduler | None = None,
    clip_norm: float | None = None,
    project: Callable[[Tree], Tree] | None = None,
    guard: Guard = "raise",
    checkpoint: str | Path | None = None,
    calibration_period: int = 50,
) -> Reports:
    """Run the inner loop again and again; after each run λ moves by its hypergradient.

    The user's tensors are not touched; the last report holds the result.

    Args:
        step: Φ.
        outer_loss: ``(w, lam, batch) -> scalar``.
        w0: initial weights of each run.
        lam: initial hyperparameters; ``None`` where only the initial weights learn (``initial``).
        batches: one per inner step, as in :func:`metaopt.hypergradient`.
        outer_batch: what the outer loss is evaluated on.
        tasks: ``run -> (batches, outer_batch)`` in place of the two: other data, for instance a
            meta-batch of other tasks, in each run.
        estimator: default ``mo.RMD()``, the exact gradient.
        optimizer: ``params -> torch.optim optimiser``, or a configured one over the leaves of
            ``lam`` (a copy is used). Needed unless ``lam`` is ``None``.
        runs: how many.
        horizon: T; default: all of a sequence.
        initial: how the initial weights learn from each run: ``mo.meta.Reptile()``,
            ``mo.meta.FOMAML()``; by default they stay.
        scheduler: ``optimizer -> lr scheduler``, stepped after every run.
        clip_norm: bound on the hypergradient's global norm.
        project: ``lam -> lam`` after every update.
        guard: what becomes of numbers that are not finite: "raise", "skip" (λ stays, the next run is
            taken) or "stop". What was left out is counted in the report.
        checkpoint: a file, written after every run; where it is there already, the loop goes on from
            it, torch's random state included. A finished loop gives its last report again.
        calibration_period: an estimator with a setting that has to be fitted (HyperDistill's θ) is
            fitted before runs 1, 1 + period, …

    Raises:
        ValueError: if the checkpoint is damaged or of a run with other settings; it names them.
        FloatingPointError: if a loss or hypergradient is not finite.

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, x: lam.exp() * (w - x).square().sum(), mo.optim.SGD(lr=0.1))
    >>> loss = lambda w, lam, x: (w - x).square().sum()
    >>> adam = lambda params: torch.optim.Adam(params, lr=0.1)
    >>> problem = (step, loss, torch.zeros(2), torch.tensor(0.0), [torch.ones(2)] * 5, torch.ones(2))
    >>> for report in tune(*problem, optimizer=adam, runs=3):
    ...     print(f"{report.number} {float(report.outer_loss):.3f} {float(report.lam):.1f}")
    1 0.215 0.1
    2 0.165 0.2
    3 0.122 0.3
    """
    check_arguments(step, w0, lam, batches, estimator, outer_loss)
    checks.count("tune", "runs", runs)
    checks.count("tune", "calibration_period", calibration_period)
    checks.one_of("tune", "guard", guard, ("raise", "skip", "stop"))
    if (batches is None) == (tasks is None):
        raise TypeError("tune takes either batches and outer_batch, or tasks=run -> (batches, outer_batch)")
    if lam is None and isinstance(initial, Fixed):
        raise ValueError("nothing learns: lam is None, and the initial weights stay; take initial=mo.meta.Reptile()")
    if checkpoint is not None and isinstance(batches, Iterator):
        raise TypeError(
            "an iterator cannot be read again after a kill: with checkpoint=, batches is a list, a loader or a function"
        )
    outer = None
    if lam is not None:
        if optimizer is None:
            raise TypeError("tune needs optimizer=, e.g. lambda params: torch.optim.Adam(params, lr=1e-3)")
        outer = OuterOptimizer(lam, optimizer, scheduler=scheduler, clip_norm=clip_norm, project=project)
        outer.check_size(estimator)
    data = tasks if tasks is not None else _Constant(batches, outer_batch)
    loop = _Tuning(step, outer_loss, data, estimator, horizon, initial, guard, calibration_period)
    return Reports(loop.reports(w0, outer, runs, None if checkpoint is None else Path(checkpoint)), runs, "run")


class _Constant(NamedTuple):
    """The same data in every run."""

    batches: Any
    outer_batch: Any

    def __call__(self, run: int) -> tuple[Any, Any]:
        return self.batches, self.outer_batch


@dataclass
class _Progress:
    """Where the loop has got to."""

    phi: Tree
    estimator: Estimator
    run: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class _Tuning:
    """What one call of :func:`tune` was given."""

    step: Step
    outer_loss: OuterLoss
    tasks: Tasks
    estimator: Estimator
    horizon: int | None
    initial: Initialisation
    guard: Guard
    calibration_period: int

    def reports(
        self, w0: Tree, outer: OuterOptimizer | None, runs: int, path: Path | None
    ) -> Generator[Report, None, None]:
        at = _Progress(w0, self.estimator)
        settings = None
        if path is not None:
            settings = self._settings(w0, outer)
        if path is not None and path.exists():
            content = files.read(path, "tune", settings).open()
            at = _Progress(content["phi"], content["estimator"], content["run"], content["skipped"])
            if outer is not None:
                outer.load_state_dict(content["outer"])
            replay.restore(content["rng"])
            if at.run >= runs or content["stopped"]:
                yield content["report"]
                return
        started = time.perf_counter()
        while at.run < runs:
            at.run += 1
            cost = Cost()
            result, state = self._run(at, outer, cost)
            now = time.perf_counter()
            report = self._report(at, outer, result, state, cost, now - started)
            started = now
            stopped = result is None and self.guard == "stop"
            if path is not None:
                _keep(path, at, outer, report, stopped, settings)
            yield report
            if stopped:
                return

    def _run(self, at: _Progress, outer: OuterOptimizer | None, cost: Cost) -> tuple[Hypergradient | None, InnerState]:
        """One inner run, and what λ and the initial weights learn from it.

        ``None`` and its start if it was passed over.
        """
        batches, outer_batch = self.tasks(at.run)
        lam = None if outer is None else outer.lam
        try:
            if (at.run - 1) % self.calibration_period == 0 and self.estimator.needs_calibration:
                counted = CountedStep(self.step, cost)
                given = (batches, outer_batch, self.horizon)
                at.estimator = calibrated(self.estimator, counted, self.outer_loss, at.phi, lam, *given)
            result = hypergradient(
                self.step,
                self.outer_loss,
                at.phi,
                lam,
                batches,
                outer_batch,
                estimator=at.estimator,
                horizon=self.horizon,
            )
            phi = self._learned(at.phi, result.state, lam, outer_batch)
        except FloatingPointError:
            if self.guard == "raise":
                raise
            at.skipped += 1
            return None, InnerState(at.phi)
        at.phi = phi
        if outer is not None:
            outer.update(result.total)
            outer.end_run()
        return result, result.state

    def _learned(self, phi: Tree, state: InnerState, lam: Tree, outer_batch: Any) -> Tree:
        if isinstance(self.initial, Fixed):
            return phi
        alpha = None
        if self.initial.needs_alpha:
            _, alpha, _ = outer_gradient(self.outer_loss, state.w, lam, outer_batch)
        last = state.w
        if not is_stacked(self.step):
            last, alpha = (
                tree.map(lambda x: x.unsqueeze(0), part) if part is not None else None for part in (last, alpha)
            )
        return tree.detach(self.initial.update(phi, last, alpha))

    def _report(
        self,
        at: _Progress,
        outer: OuterOptimizer | None,
        result: Hypergradient | None,
        state: InnerState,
        cost: Cost,
        seconds: float,
    ) -> Report:
        lam = None if outer is None else outer.lam
        device = tree.floats(at.phi)[0].device
        whole = cost if result is None else cost + result.cost
        learned = None if isinstance(self.initial, Fixed) else at.phi
        return Report(at.run, lam, state, result, whole, seconds, peak_bytes(device), at.skipped, learned)

    def _settings(self, w0: Tree, outer: OuterOptimizer | None) -> dict[str, Any]:
        return {
            "estimator": described(self.estimator),
            "horizon": self.horizon,
            "initial": described(self.initial),
            "guard": self.guard,
            "calibration_period": self.calibration_period,
            "outer": None if outer is None else outer.settings(),
            "step": described(self.step),
            "w0": described(w0),
            "lam": None if outer is None else described(outer.lam),
            "seed": files.seed(),
            "torch": files.TORCH,
        }


def _keep(
    path: Path, at: _Progress, outer: OuterOptimizer | None, report: Report, stopped: bool, settings: Any
) -> None:
    result = report.hypergradient
    content = {
        "run": at.run,
        "phi": at.phi,
        "estimator": at.estimator,
        "skipped": at.skipped,
        "outer": None if outer is None else outer.state_dict(),
        "rng": replay.snapshot(at.phi),
        "report": report._replace(hypergradient=None if result is None else result._replace(info=None)),
        "stopped": stopped,
    }
    files.write(path, "tune", content, settings)
