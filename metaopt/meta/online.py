"""Online: λ moves while the inner loop runs (algorithm 3 of the HyperDistill paper)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

from metaopt.estimators.base import Estimator
from metaopt.estimators.cost import Cost, CountedStep
from metaopt.estimators.hypergradient import Batches, Hypergradient, each, evaluate
from metaopt.estimators.outer import OuterLoss, OuterObjective
from metaopt.inner.contract import Step
from metaopt.inner.state import InnerState
from metaopt.meta.outer import Outer, OuterOptimizer, Scheduler
from metaopt.tree import Tree


class OnlineReport(NamedTuple):
    """One inner step of an online run.

    Attributes:
        t: number of the step, 1 … T.
        state: inner state after it.
        lam: hyperparameters after it.
        hypergradient: what moved λ, taken at the new weights and the λ before the update; ``None``
            where no hyper-step was due.
    """

    t: int
    state: InnerState
    lam: Tree
    hypergradient: Hypergradient | None

    @property
    def outer_loss(self) -> Tensor | None:
        """The outer loss where a hyper-step was due, else ``None``."""
        return None if self.hypergradient is None else self.hypergradient.outer_loss


class HyperSteps(NamedTuple):
    """When λ moves: at every ``every``-th inner step, among the ``last`` ones of the run (``None``: all of them)."""

    every: int = 1
    last: int | None = None

    def due(self, t: int, horizon: int | None) -> bool:
        """Whether a hyper-step follows inner step ``t`` of ``horizon``."""
        if self.last is not None and (horizon is None or t <= horizon - self.last):
            return False
        return t % self.every == 0


def online(
    step: Step,
    outer_loss: OuterLoss,
    w0: Tree,
    lam: Tree,
    batches: Batches,
    outer_batches: Batches,
    estimator: Estimator,
    optimizer: OuterOptimizer,
    *,
    horizon: int | None = None,
    hyper_steps: HyperSteps = HyperSteps(),
    scheduler: Scheduler | None = None,
    clip_norm: float | None = None,
    project: Callable[[Tree], Tree] | None = None,
) -> Iterator[OnlineReport]:
    """One inner run in which λ is updated as it goes.

    Order inside step t: the estimator remembers, ``w_t = Φ(w_{t-1}, λ; D_t)``, the hypergradient at
    ``(w_t, λ)``, the update of λ. The user's tensors are not touched; the last report holds the
    result.

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

    Raises:
        ValueError: if the estimator needs λ fixed during the run.
        FloatingPointError: if a loss or hypergradient is not finite.

    Warns:
        SizeWarning: if the estimator's size is its own (EvoGrad without ``unit_rate``), and the
            outer optimiser not scale-free.
    """
    outer = Outer(lam, optimizer, scheduler=scheduler, clip_norm=clip_norm, project=project)
    for report in run_online(
        step, outer_loss, w0, outer, batches, outer_batches, estimator, horizon=horizon, hyper_steps=hyper_steps
    ):
        if report.hypergradient is not None:
            outer.end_run()
        yield report


def run_online(
    step: Step,
    outer_loss: OuterLoss,
    w0: Tree,
    outer: Outer,
    batches: Batches,
    outer_batches: Batches,
    estimator: Estimator,
    *,
    horizon: int | None = None,
    hyper_steps: HyperSteps = HyperSteps(),
) -> Iterator[OnlineReport]:
    """The loop of :func:`online`, with an outer optimiser that may already have a past (meta-training keeps it between runs)."""
    if not estimator.online:
        raise ValueError(
            f"{type(estimator).__name__} needs lam fixed during the inner run and cannot be used online; use "
            "mo.hypergradient or an offline loop"
        )
    outer.check_size(estimator)
    if horizon is None and not callable(batches):
        horizon = len(batches)
    counted = CountedStep(step, Cost())
    state = counted.init(w0, outer.lam)
    carry = estimator.init(counted, state, outer.lam)
    for t, (batch, outer_batch) in enumerate(
        zip(each(batches, horizon), each(outer_batches, horizon), strict=True), start=1
    ):
        state, carry = estimator.advance(counted, state, outer.lam, batch, carry)
        carry = estimator.observe(counted, OuterObjective(outer_loss, outer_batch), state, outer.lam, carry)
        result = None
        if hyper_steps.due(t, horizon):
            result = evaluate(counted, outer_loss, state, outer.lam, outer_batch, estimator, carry)
            carry = estimator.reuse(carry, result.info)
            outer.update(result.total)
            counted.cost = Cost()
        yield OnlineReport(t, state, outer.lam, result)
