"""Settings of an estimator fitted to one run before it is used (HyperDistill's θ)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from metaopt import replay
from metaopt.estimators.base import Estimator, FinishedRun
from metaopt.estimators.hypergradient import Batches, opened
from metaopt.estimators.outer import OuterLoss, outer_gradient
from metaopt.inner.contract import Step
from metaopt.inner.tasks import for_all_tasks
from metaopt.tree import Tree


def calibrated(
    estimator: Estimator,
    step: Step,
    outer_loss: OuterLoss,
    w0: Tree,
    lam: Tree,
    batches: Batches,
    outer_batch: Any,
    horizon: int | None = None,
) -> Estimator:
    """The estimator fitted to one plain run; torch's random state stays as it is.

    Cost: T steps, and what :meth:`~metaopt.Estimator.calibrate` takes.

    Raises:
        TypeError: if the batches can be read only once.
    """
    if isinstance(batches, Iterator):
        raise TypeError(
            f"{type(estimator).__name__} is fitted to one run before the first, and batches is an iterator, which can "
            "be read only once: give a list, a loader or a function of t, or call estimator.calibrate yourself"
        )
    with replay.preserved(w0):
        run = list(opened(batches, horizon, step.steps_at_once)[1])
        first = state = step.init(for_all_tasks(step, w0, run[0]), lam)
        for batch in run:
            state = step(state, lam, batch)
        _, alpha, _ = outer_gradient(outer_loss, state.w, lam, outer_batch)
        return estimator.calibrate(step, lam, FinishedRun(first, state, run, alpha))
