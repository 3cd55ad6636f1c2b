"""Test time: adapt to new tasks, and score what came out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metaopt.estimators._arguments import check_tree
from metaopt.estimators.hypergradient import Batches, opened
from metaopt.inner.contract import Step, checked_scalar
from metaopt.inner.state import InnerState
from metaopt.inner.tasks import TaskLoss, Vmapped, for_all_tasks, is_stacked
from metaopt.tree import Tree


def evaluate(
    step: Step,
    metric: Callable[[Tree, Tree, Any], Tensor],
    w0: Tree,
    lam: Tree,
    batches: Batches,
    test_batch: Any,
    *,
    horizon: int | None = None,
) -> Tensor:
    """Run the inner loop on training data, and the metric on test data; no graph is kept.

    Args:
        step: Φ, of one task or of a meta-batch.
        metric: ``(w, lam, batch) -> scalar`` of one task: an outer loss, an accuracy.
        w0: initial weights, of one task or stacked, or a state to go on from.
        lam: hyperparameters.
        batches: one per inner step, as in :func:`metaopt.hypergradient`.
        test_batch: what the metric is taken on.
        horizon: T; default: as many steps as there are batches.

    Returns:
        The metric of each task, ``[tasks]``; where the step is one task's, a scalar.

    >>> import metaopt as mo
    >>> loss = mo.vmapped(lambda w, lam, x: 0.5 * (w - x).square())
    >>> step = mo.inner_step(loss, mo.optim.SGD(lr=0.5))
    >>> evaluate(step, lambda w, lam, x: (w - x).abs(), torch.tensor(0.0), None, [torch.ones(3)], torch.ones(3))
    tensor([0.5000, 0.5000, 0.5000])
    """
    check_tree(w0, "w0", "mo.functional(module).params")
    first, stream = opened(batches, horizon, step.steps_at_once)
    with torch.no_grad():
        state = w0 if isinstance(w0, InnerState) else step.init(for_all_tasks(step, w0, first), lam)
        for batch in stream:
            state = step(state, lam, batch)
        if not is_stacked(step):
            return checked_scalar(metric(state.w, lam, test_batch), "the metric")
        loss = getattr(step, "inner_loss", None)
        over = replace(loss, loss=metric) if isinstance(loss, TaskLoss) else Vmapped(metric)
        return over.each(state.w, lam, test_batch)
