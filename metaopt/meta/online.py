"""Online: λ moves while the inner loop runs (algorithm 3 of the HyperDistill paper)."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from metaopt import checks, replay, tree
from metaopt.estimators._arguments import check_arguments, check_several
from metaopt.estimators.base import Estimator
from metaopt.estimators.cost import Cost, CountedStep
from metaopt.estimators.hypergradient import Batches, Hypergradient, each, evaluate
from metaopt.estimators.outer import OuterLoss, OuterObjective
from metaopt.inner.contract import Step
from metaopt.inner.state import InnerState
from metaopt.inner.tasks import for_all_tasks
from metaopt.meta import checkpoint as files
from metaopt.meta._packed import described
from metaopt.meta.calibration import calibrated
from metaopt.meta.hyper_steps import HyperSteps
from metaopt.meta.outer_optimizer import MakesOptimizer, OuterOptimizer, Scheduler
from metaopt.meta.report import Guard, Report, Reports, peak_bytes
from metaopt.tree import Tree


def online(
    step: Step,
    outer_loss: OuterLoss,
    w0: Tree,
    lam: Tree,
    batches: Batches,
    outer_batches: Batches,
    *,
    estimator: Estimator,
    optimizer: MakesOptimizer,
    horizon: int | None = None,
    hyper_steps: HyperSteps = HyperSteps(),
    scheduler: Scheduler | None = None,
    clip_norm: float | None = None,
    project: Callable[[Tree], Tree] | None = None,
    guard: Guard = "raise",
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
) -> Reports:
    """One inner run in which λ is updated as it goes.

    Order inside step t: the estimator remembers, ``w_t = Φ(w_{t-1}, λ; D_t)``, the hypergradient at
    ``(w_t, λ)``, the update of λ. The user's tensors are not touched; the last report holds the
    result. An estimator with a setting that has to be fitted (HyperDistill's θ) is fitted to one
    plain run before the first step.

    Args:
        step: Φ.
        outer_loss: ``(w, lam, batch) -> scalar``.
        w0: initial weights.
        lam: initial hyperparameters.
        batches: one per inner step, or ``t -> batch`` with ``horizon``.
        outer_batches: the same for the outer loss; one is taken for every inner step.
        estimator: one with ``online``.
        optimizer: ``params -> torch.optim optimiser`` or a configured one over the leaves of
            ``lam`` (a copy is used).
        horizon: T.
        hyper_steps: when λ moves.
        scheduler: ``optimizer -> lr scheduler``, stepped after every hyper-step.
        clip_norm: bound on the hypergradient's global norm.
        project: ``lam -> lam`` after every update.
        guard: what becomes of a hypergradient that is not finite: "raise", "skip" or "stop". Where
            the weights are not finite either, "skip" raises: nothing after it would be.
        checkpoint: a file. It is written as the run goes; where it is there already, the run goes on
            from it, torch's random state included. A finished run gives its last report again.
        checkpoint_every: inner steps between two writes; the last step is always written.

    Raises:
        ValueError: if the estimator needs λ fixed during the run, if λ would never move, or if the
            checkpoint is damaged or of another run.
        FloatingPointError: if a loss or hypergradient is not finite.

    Warns:
        SizeWarning: if the estimator's size is its own (EvoGrad without ``unit_rate``), and the
            outer optimiser not scale-free.
    """
    check_arguments(step, w0, lam, batches, estimator, outer_loss)
    check_several(outer_batches, "outer_batches")
    checks.one_of("online", "guard", guard, ("raise", "skip", "stop"))
    checks.count("online", "checkpoint_every", checkpoint_every)
    if step.steps_at_once is not None:
        raise ValueError("online takes single steps, since λ may move after each: give the step without steps_at_once")
    outer = OuterOptimizer(lam, optimizer, scheduler=scheduler, clip_norm=clip_norm, project=project)
    run = OnlineRun(step, outer_loss, batches, outer_batches, estimator, horizon, hyper_steps, guard)
    run.check(outer)
    path = None if checkpoint is None else Path(checkpoint)
    return Reports(run.reports(w0, outer, path, checkpoint_every), run.steps, "step")


@dataclass
class _Position:
    """Where an online run has got to."""

    t: int
    state: InnerState
    carry: Any
    estimator: Estimator
    skipped: int = 0
    moved: bool = False


@dataclass(frozen=True)
class OnlineRun:
    """What :func:`online` runs, with an outer optimiser that may already have a past (meta-training keeps it).

    The attributes are :func:`online`'s arguments, and ``scheduled``: whether the outer optimiser's
    schedule goes on at every hyper-step.
    """

    step: Step
    outer_loss: OuterLoss
    batches: Batches
    outer_batches: Batches
    estimator: Estimator
    horizon: int | None = None
    hyper_steps: HyperSteps = HyperSteps()
    guard: Guard = "raise"
    scheduled: bool = True

    @property
    def steps(self) -> int | None:
        """T, where it is known."""
        if self.horizon is None and hasattr(self.batches, "__len__"):
            return len(self.batches)  # type: ignore[arg-type]
        return self.horizon

    def check(self, outer: OuterOptimizer) -> None:
        """What can be said before the first step."""
        if not self.estimator.online:
            raise ValueError(
                f"{type(self.estimator).__name__} needs lam fixed during the inner run and cannot be used online; use "
                "mo.tune, where lam moves after each run"
            )
        if self.steps == 0:
            raise ValueError("batches is empty: one batch per inner step is needed")
        self.hyper_steps.check(self.steps)
        outer.check_size(self.estimator)

    def reports(
        self, w0: Tree, outer: OuterOptimizer, path: Path | None = None, checkpoint_every: int = 100
    ) -> Generator[Report, None, None]:
        """One report per inner step, from ``path`` on if there is such a file."""
        settings = None if path is None else self._settings(w0, outer)
        if path is not None and path.exists():
            yield from self._resumed(files.read(path, "online", settings), outer, checkpoint_every, settings)
            return
        before = replay.snapshot(w0)
        pairs = self._pairs(0)
        batch, outer_batch = next(pairs)
        pairs = itertools.chain([(batch, outer_batch)], pairs)
        counted = CountedStep(self.step, Cost())
        estimator = self.estimator
        if estimator.needs_calibration:
            estimator = calibrated(
                estimator, counted, self.outer_loss, w0, outer.lam, self.batches, outer_batch, self.horizon
            )
        state = counted.init(for_all_tasks(self.step, w0, batch), outer.lam)
        position = _Position(0, state, estimator.init(counted, state, outer.lam), estimator)
        keep = None if path is None else _Keeper(path, checkpoint_every, settings, before)
        yield from self._go(counted, position, outer, pairs, keep)

    def _go(
        self,
        counted: CountedStep,
        at: _Position,
        outer: OuterOptimizer,
        pairs: Iterator[tuple[Any, Any]],
        keep: _Keeper | None,
    ) -> Generator[Report, None, None]:
        device = tree.floats(at.state.w)[0].device
        started = time.perf_counter()
        report = None
        batch = None
        for batch, outer_batch in pairs:
            at.t += 1
            objective = OuterObjective(self.outer_loss, outer_batch)
            at.state, at.carry = at.estimator.advance(counted, at.state, outer.lam, batch, at.carry)
            at.carry = at.estimator.observe(counted, objective, at.state, outer.lam, at.carry)
            due = self.hyper_steps.due(at.t, self.steps)
            result = self._moved(counted, at, outer, outer_batch) if due else None
            now = time.perf_counter()
            report = Report(
                at.t, outer.lam, at.state, result, counted.cost, now - started, peak_bytes(device), at.skipped
            )
            started = now
            counted.cost = Cost()
            if keep is not None:
                keep.note(at, outer, batch, report, last=at.t == self.steps)
            yield report
            if due and result is None and self.guard == "stop":
                break
        if keep is not None and report is not None and at.t != self.steps:
            keep.note(at, outer, batch, report, last=True)

    def _moved(
        self, counted: CountedStep, at: _Position, outer: OuterOptimizer, outer_batch: Any
    ) -> Hypergradient | None:
        """λ moved by the hypergradient; ``None`` where that is not finite and the guard passes over it."""
        try:
            result = evaluate(
                counted, self.outer_loss, at.state, outer.lam, outer_batch, at.estimator, at.carry, look=not at.moved
            )
        except FloatingPointError:
            if self.guard == "raise" or (self.guard == "skip" and not tree.is_finite(at.state.w)):
                raise
            at.skipped += 1
            return None
        at.moved = True
        at.carry = at.estimator.reuse(at.carry, result.info)
        outer.update(result.total)
        if self.scheduled:
            outer.end_run()
        return result

    def _pairs(self, start: int) -> Iterator[tuple[Any, Any]]:
        """Inner and outer batches from step ``start + 1`` on."""
        inner = _from(self.batches, self.horizon, start)
        outer = _from(self.outer_batches, self.steps, start, "outer_batches")
        for t, batch in enumerate(inner, start + 1):
            outer_batch = next(outer, _MISSING)
            if outer_batch is _MISSING:
                raise ValueError(
                    f"outer_batches has {t - 1} batches, and the run has more steps: one is needed for every inner "
                    "step; mo.cycle(loader) starts again, and lambda t: batch gives the same one"
                )
            yield batch, outer_batch

    def _settings(self, w0: Tree, outer: OuterOptimizer) -> dict[str, Any]:
        return {
            "estimator": described(self.estimator),
            "horizon": self.steps,
            "hyper_steps": described(self.hyper_steps),
            "guard": self.guard,
            "outer": outer.settings(),
            "step": described(self.step),
            "w0": described(w0),
            "lam": described(outer.lam),
            "seed": files.seed(),
            "torch": files.TORCH,
        }

    def _resumed(
        self, stored: files.Stored, outer: OuterOptimizer, checkpoint_every: int, settings: Any
    ) -> Generator[Report, None, None]:
        number = stored.peek("t")
        before = stored.peek("before")
        replay.restore(before)
        pairs = self._pairs(number - 1)
        batch, _ = next(pairs)
        content = stored.open(_tensors(batch))
        outer.load_state_dict(content["outer"])
        replay.restore(content["rng"])
        at = _Position(number, content["state"], content["carry"], content["estimator"], content["skipped"])
        if content["report"] is not None:
            yield content["report"]
            return
        keep = _Keeper(stored.path, checkpoint_every, settings, before)
        yield from self._go(CountedStep(self.step, Cost()), at, outer, pairs, keep)


@dataclass(frozen=True)
class _Keeper:
    """Writes an online run's checkpoints.

    Attributes:
        path: the file.
        every: steps between two.
        settings: of the run.
        before: torch's random state before its first batch was drawn.
    """

    path: Path
    every: int
    settings: Any
    before: replay.Rng

    def note(self, at: _Position, outer: OuterOptimizer, batch: Any, report: Report, *, last: bool) -> None:
        """Write one if it is time. The tensors of the last batch are not stored: the run reads it again."""
        if not last and at.t % self.every:
            return
        content = {
            "t": at.t,
            "before": self.before,
            "rng": replay.snapshot(at.state),
            "outer": outer.state_dict(),
            "state": at.state,
            "carry": at.carry,
            "estimator": at.estimator,
            "skipped": at.skipped,
            "report": report._replace(hypergradient=_plain(report.hypergradient)) if last else None,
        }
        files.write(self.path, "online", content, self.settings, _tensors(batch))


_MISSING = object()


def _plain(result: Hypergradient | None) -> Hypergradient | None:
    """The hypergradient without what the method reports about itself, which need not be storable."""
    return None if result is None else result._replace(info=None)


def _tensors(batch: Any) -> list[Tensor]:
    return [leaf for leaf in tree.leaves(batch) if isinstance(leaf, Tensor)]


def _from(batches: Batches, horizon: int | None, start: int, name: str = "batches") -> Iterator[Any]:
    """The batches of steps ``start + 1`` … T."""
    if callable(batches) and horizon is not None:
        return (batches(t) for t in range(start + 1, horizon + 1))
    return itertools.islice(each(batches, horizon, name), start, None)
