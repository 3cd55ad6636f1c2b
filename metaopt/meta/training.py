"""Meta-training: many inner runs, with λ (and the initial weights φ) carried from one to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from metaopt import replay, tree
from metaopt.estimators.base import Estimator
from metaopt.estimators.cost import Cost, CountedStep
from metaopt.estimators.hypergradient import hypergradient
from metaopt.estimators.outer import OuterLoss, outer_gradient
from metaopt.inner.contract import Step
from metaopt.inner.state import InnerState
from metaopt.inner.tasks import replicated
from metaopt.meta.calibration import calibrated
from metaopt.meta.checkpoint import Checkpoint
from metaopt.meta.hyper_steps import HyperSteps
from metaopt.meta.initialisation import Fixed, Initialisation
from metaopt.meta.online import OnlineRun
from metaopt.meta.outer_optimizer import OuterOptimizer
from metaopt.tree import Tree


class MetaTask(NamedTuple):
    """The data of one inner run: a stacked meta-batch of tasks.

    Attributes:
        batches: inner batches, every tensor with the task axis first.
        outer_batches: outer batches, alike; an offline estimator uses the last.
        tasks: how many tasks are stacked.
    """

    batches: Sequence[Any] | Callable[[int], Any]
    outer_batches: Sequence[Any] | Callable[[int], Any]
    tasks: int


class MetaReport(NamedTuple):
    """One inner run of meta-training.

    Attributes:
        run: number of the run, 1 … M.
        lam: hyperparameters after it.
        phi: initial weights after it.
        state: inner state at its end.
        outer_losses: outer loss at every hyper-step, summed over tasks.
        cost: work of the run, calibration included.
        estimator: as used in it (calibrated).
    """

    run: int
    lam: Tree
    phi: Tree
    state: InnerState
    outer_losses: list[float]
    cost: Cost
    estimator: Estimator

    def checkpoint(self, outer: OuterOptimizer, notes: Any = None) -> Checkpoint:
        """What :meth:`MetaTraining.runs` needs to go on after this run."""
        return Checkpoint(self.run, self.phi, outer.state_dict(), self.estimator, notes, replay.snapshot(self.state))


@dataclass(frozen=True)
class MetaTraining:
    """How meta-training goes; :meth:`runs` does it.

    An estimator with ``online`` moves λ during each run, any other once at its end.

    Attributes:
        step: Φ of the stacked problem (see :func:`metaopt.vmapped`).
        outer_loss: outer loss of the stacked problem.
        estimator: the estimator.
        horizon: T.
        hyper_steps: when λ moves in an online run.
        initialisation: how φ learns: :class:`~metaopt.meta.Reptile`, :class:`~metaopt.meta.FOMAML`
            or :class:`~metaopt.meta.Fixed`.
        calibration_period: the estimator is calibrated before runs 1, 1 + period, 1 + 2·period, …
    """

    step: Step
    outer_loss: OuterLoss
    estimator: Estimator
    horizon: int
    hyper_steps: HyperSteps = HyperSteps()
    initialisation: Initialisation = field(default_factory=Fixed)
    calibration_period: int = 50

    def runs(
        self,
        phi: Tree,
        outer: OuterOptimizer,
        tasks: Callable[[int], MetaTask],
        count: int,
        *,
        resume: Checkpoint | None = None,
    ) -> Iterator[MetaReport]:
        """Yield a report after each of ``count`` runs.

        Args:
            phi: initial weights of one task.
            outer: λ and its optimiser.
            tasks: ``run -> MetaTask`` for runs 1 … count; run 0 is asked for the calibration's data
                of run 1, -50 of run 51, ….
            count: M.
            resume: where an earlier, broken-off call had got to (:meth:`MetaReport.checkpoint`);
                its φ, λ and estimator take the place of ``phi``, ``outer``'s and this object's, and
                the remaining runs give the numbers that they would have given.
        """
        estimator = self.estimator
        done = 0
        if resume is not None:
            phi = resume.phi
            estimator = resume.estimator
            done = resume.run
            outer.load_state_dict(resume.outer)
            if resume.rng is not None:
                replay.restore(resume.rng)
        for run in range(done + 1, count + 1):
            cost = Cost()
            if (run - 1) % self.calibration_period == 0:
                estimator = self._calibrated(estimator, phi, outer.lam, tasks(1 - run), cost)
            task = tasks(run)
            w0 = replicated(phi, task.tasks)
            if estimator.online:
                state, losses, cost = self._online(estimator, w0, outer, task, cost)
            else:
                state, losses, cost = self._offline(estimator, w0, outer, task, cost)
            outer.end_run()
            phi = self._learn_phi(phi, state, outer.lam, task)
            yield MetaReport(run, outer.lam, phi, state, losses, cost, estimator)

    def _online(
        self, estimator: Estimator, w0: Tree, outer: OuterOptimizer, task: MetaTask, cost: Cost
    ) -> tuple[InnerState, list[float], Cost]:
        losses = []
        state = None
        run = OnlineRun(
            self.step,
            self.outer_loss,
            task.batches,
            task.outer_batches,
            estimator,
            self.horizon,
            self.hyper_steps,
            scheduled=False,
        )
        run.check(outer)
        for report in run.reports(w0, outer):
            state = report.state
            cost = cost + report.cost
            if report.outer_loss is not None:
                losses.append(report.outer_loss)
        assert state is not None  # the horizon is at least 1
        return state, [float(loss) for loss in losses], cost

    def _offline(
        self, estimator: Estimator, w0: Tree, outer: OuterOptimizer, task: MetaTask, cost: Cost
    ) -> tuple[InnerState, list[float], Cost]:
        result = hypergradient(
            self.step,
            self.outer_loss,
            w0,
            outer.lam,
            task.batches,
            self._last_outer_batch(task),
            estimator=estimator,
            horizon=self.horizon,
        )
        outer.update(result.total)
        return result.state, [float(result.outer_loss)], cost + result.cost

    def _calibrated(self, estimator: Estimator, phi: Tree, lam: Tree, task: MetaTask, cost: Cost) -> Estimator:
        if type(estimator).calibrate is Estimator.calibrate:
            return estimator
        counted = CountedStep(self.step, cost)
        w0 = replicated(phi, task.tasks)
        last = self._last_outer_batch(task)
        return calibrated(estimator, counted, self.outer_loss, w0, lam, task.batches, last, self.horizon)

    def _learn_phi(self, phi: Tree, state: InnerState, lam: Tree, task: MetaTask) -> Tree:
        alpha = None
        if self.initialisation.needs_alpha:
            _, alpha, _ = outer_gradient(self.outer_loss, state.w, lam, self._last_outer_batch(task))
        return tree.detach(self.initialisation.update(phi, state.w, alpha))

    def _last_outer_batch(self, task: MetaTask) -> Any:
        return (
            task.outer_batches(self.horizon) if callable(task.outer_batches) else task.outer_batches[self.horizon - 1]
        )
