"""Whole runs against plain torch: every trajectory, and every way through a step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaopt import tree
from metaopt.estimators import FMD, RMD, Estimator, OneStep, TruncatedRMD, hypergradient, unroll
from metaopt.inner import ForwardOverReverse, InnerStep, Step, chunked, custom_step, in_chunks
from metaopt.tree import vector
from metaopt.verify.case import Case
from metaopt.verify.loops import HORIZON, Loop, constant_momentum, loops, reweighted_net
from metaopt.verify.report import Row, relative_error
from metaopt.verify.tables import TRAJECTORIES, TrajectoryCase

TOLERANCE = 1e-10


class Answer(NamedTuple):
    """What metaopt says where :class:`~metaopt.verify.loops.Truth` says what is so."""

    total: Tensor
    initial: Tensor | None
    reached: Tensor
    generator: Tensor


# -- trajectories --------------------------------------------------------------------------------
def trajectory_rows(name: str) -> Iterator[Row]:
    """Exact reverse mode over each setting of a trajectory, on every loop it can run."""
    for case in TRAJECTORIES:
        if case.name.split(",")[0] == name:
            yield from _over(case)


def _over(case: TrajectoryCase) -> Iterator[Row]:
    trajectory = case.make(HORIZON)
    if not trajectory.exact:
        return
    for loop in loops():
        if case.name == "Reversible" and not loop.momentum_sgd:
            continue
        yield from compared(case.name, loop, RMD(trajectory))


# -- ways through a step -------------------------------------------------------------------------
def step_rows() -> dict[str, Callable[[], Iterator[Row]]]:
    """Name to rows: adjoint modes, chunks, wrappers, forward mode, truncation, ``unroll``."""
    return {
        "ReverseOverReverse": lambda: _through(lambda step: step, loops()[:4]),
        "ForwardOverReverse": lambda: _through(_forward_over_reverse, loops()[1:4]),
        "chunked": lambda: _chunks(loops()[:4]),
        "custom_step": lambda: _through(lambda step: custom_step(step, step.init), loops()[1:4]),
        "ConstantSlots": lambda: compared("slots are constants", constant_momentum(), RMD()),
        "reweighted": lambda: _reweighted(),
        "forward mode": lambda: _estimators(loops()[:5]),
        "unroll": lambda: _unrolled(loops()),
    }


def _through(change: Callable[[Any], Step], chosen: list[Loop]) -> Iterator[Row]:
    for loop in chosen:
        step = change(loop.problem.step)
        problem = replace(loop.problem, step=step)
        yield from compared("RMD", replace(loop, problem=problem), RMD())


def _forward_over_reverse(step: InnerStep) -> Step:
    return replace(step, adjoint=ForwardOverReverse())


def _chunks(chosen: list[Loop]) -> Iterator[Row]:
    for loop in chosen:
        batches = in_chunks(loop.problem.batches, 3)
        step = chunked(loop.problem.step)
        problem = replace(loop.problem, step=step, batches=batches)
        got = answer(replace(loop, problem=problem), RMD(), len(batches))
        yield from _rows("chunks of 3", loop, got, loop.truth(HORIZON))


def _reweighted() -> Iterator[Row]:
    loop = reweighted_net()
    yield from compared("RMD", loop, RMD())
    yield from compared("FMD", loop, FMD())


def _estimators(chosen: list[Loop]) -> Iterator[Row]:
    """Forward mode, and the truncations, whose older state is a constant."""
    for loop in chosen:
        yield from compared("FMD", loop, FMD())
        for last in (1, 5):
            truth = loop.truth(HORIZON, last)
            estimator = OneStep() if last == 1 else TruncatedRMD(last)
            got = answer(loop, estimator, HORIZON)
            yield from _rows(f"last {last}", loop, got._replace(initial=None), truth)


def _unrolled(chosen: list[Loop]) -> Iterator[Row]:
    """``unroll`` and ``backward``; λ is also handed over as tensors that the loss closes over."""
    for loop in chosen:
        p = loop.problem
        lam = tree.attach(p.lam)
        w0 = tree.attach(p.w0)
        _seed(loop)
        state = unroll(p.step, w0, lam, p.batches, horizon=HORIZON)
        inputs = tree.floats(lam) + tree.floats(w0)
        loss = p.outer_loss(state.w, lam, p.outer_batch)
        gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
        filled = [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, inputs, strict=True)]

        count = len(tree.floats(lam))
        total = vector(filled[:count])
        initial = vector(filled[count:])
        reached = vector(tree.detach(state.w))
        got = Answer(total, initial, reached, torch.get_rng_state())
        yield from _rows("unroll", loop, got, loop.truth(HORIZON))


# -- parts ---------------------------------------------------------------------------------------
def compared(what: str, loop: Loop, estimator: Estimator) -> Iterator[Row]:
    """Hold an estimator's run on a loop to autograd through that loop."""
    got = answer(loop, estimator, HORIZON)
    want = loop.truth(HORIZON)
    yield from _rows(what, loop, got, want)


def answer(loop: Loop, estimator: Estimator, horizon: int) -> Answer:
    """One hypergradient, with the loop's random draws."""
    p: Case = loop.problem
    _seed(loop)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        hg = hypergradient(
            p.step, p.outer_loss, p.w0, p.lam, p.batches, p.outer_batch, estimator=estimator, horizon=horizon
        )
    initial = None if hg.initial is None else vector(hg.initial)
    return Answer(vector(hg.total), initial, vector(hg.state.w), torch.get_rng_state())


def _seed(loop: Loop) -> None:
    if loop.draws is not None:
        torch.manual_seed(loop.draws)


def _rows(what: str, loop: Loop, got: Answer, want: Any) -> Iterator[Row]:
    case = f"{what}: {loop.problem.name}"
    error = relative_error(got.reached, want.reached)
    yield Row(case, "plain torch", error, TOLERANCE, "last weights")

    error = relative_error(got.total, want.total)
    yield Row(case, "plain torch", error, TOLERANCE, "hypergradient")

    if got.initial is not None:
        error = relative_error(got.initial, want.initial)
        yield Row(case, "plain torch", error, TOLERANCE, "initial weights")
    if loop.draws is not None:
        moved = 0.0 if torch.equal(got.generator, want.generator) else float("inf")
        yield Row(case, "plain torch", moved, 0.0, "random state afterwards")
