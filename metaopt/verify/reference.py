r"""Slow, obviously right references.

Dense Jacobians, autograd through the whole loop, finite differences with an error estimate.

None of them uses a step's ``vjp``, ``jvp`` or ``linearize``, nor any trajectory.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaopt import tree
from metaopt.estimators.hypergradient import each
from metaopt.estimators.outer import OuterLoss
from metaopt.inner.contract import Step
from metaopt.inner.state import InnerState
from metaopt.problem import Problem
from metaopt.tree import Tree, unvector, vector
from metaopt.verify.case import Case


class Jacobians(NamedTuple):
    """``A = ∂Φ/∂s`` of shape ``[|s|, |s|]`` and ``B = ∂Φ/∂λ`` of shape ``[|s|, |λ|]``.

    Both are over flattened weights, then slots.
    """

    A: Tensor
    B: Tensor


class Estimate(NamedTuple):
    """A number per coordinate, and how far off it may be."""

    value: Tensor
    error: float


def states(problem: Case, horizon: int) -> list[InnerState]:
    """The states ``s_0 … s_T`` of a run, by plain calls of the step."""
    run = [problem.step.init(problem.w0, problem.lam)]
    for t in range(horizon):
        run.append(problem.step(run[-1], problem.lam, problem.batches[t]))
    return run


def jacobians(step: Step, state: InnerState, lam: Tree, batch: Any) -> Jacobians:
    """Dense ``(A, B)`` of one step, a row at a time, by autograd through the step itself."""
    with torch.enable_grad():
        state_ = tree.attach(state)
        lam_ = tree.attach(lam)
        out = vector(step(state_, lam_, batch))
        inputs = tree.floats(state_) + tree.floats(lam_)
        rows = []
        for entry in out:
            row = [None] * len(inputs)
            if entry.requires_grad:
                row = torch.autograd.grad(entry, inputs, retain_graph=True, allow_unused=True)
            rows.append(_flat(row, inputs))
    matrix = torch.stack(rows)
    size = len(out)
    return Jacobians(matrix[:, :size], matrix[:, size:])


def along(problem: Case, run: list[InnerState], horizon: int, *, last: int | None = None) -> list[Jacobians]:
    """Dense Jacobians of the last steps of a run at the given states ``s_0 … s_{T-1}``, oldest first."""
    first = 0 if last is None else max(horizon - last, 0)
    found = []
    for t in range(first, horizon):
        found.append(jacobians(problem.step, run[t], problem.lam, problem.batches[t]))
    return found


def outer_cotangent(outer_loss: OuterLoss, state: InnerState, lam: Tree, batch: Any) -> tuple[Tensor, Tensor]:
    """``α`` as a row over the flattened state (zero on the slots), and the direct term over flattened λ."""
    with torch.enable_grad():
        w = tree.attach(state.w)
        lam_ = tree.attach(lam)
        inputs = tree.floats(w) + tree.floats(lam_)
        loss = outer_loss(w, lam_, batch)
        gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    flat = _flat(gradients, inputs)

    n_w = vector(state.w).numel()
    n_state = vector(state).numel()
    on_slots = flat.new_zeros(n_state - n_w)
    alpha = torch.cat([flat[:n_w], on_slots])
    return alpha, flat[n_w:]


def dense_sweep(alpha: Tensor, steps: Sequence[Jacobians]) -> Tensor:
    r"""Equation 3: :math:`\sum_t \alpha A_T \cdots A_{t+1} B_t` for the given steps (oldest first)."""
    size = steps[-1].B.shape[1] if steps else 0
    total = alpha.new_zeros(size)
    for A, B in reversed(steps):
        total = total + alpha @ B
        alpha = alpha @ A
    return total


def through_loop(problem: Problem, horizon: int) -> Tree:
    """Plain autograd through all T steps and the outer loss."""
    with torch.enable_grad():
        lam = tree.attach(problem.lam)
        if isinstance(problem.w0, InnerState):
            state = problem.w0
        else:
            state = problem.step.init(problem.w0, lam)

        for batch in islice(each(problem.batches, problem.horizon), horizon):
            state = problem.step(state, lam, batch)
        loss = problem.outer_loss(state.w, lam, problem.outer_batch)
        flat, spec = tree.flatten(lam)
        gradients = torch.autograd.grad(loss, flat, allow_unused=True)
    answer = tree.unflatten(gradients, spec)
    return tree.filled(answer, problem.lam)


def finite_differences(problem: Case, horizon: int, radius: float = 1e-3) -> Estimate:
    """Central differences at two radii, extrapolated (fourth order).

    The error estimate is what extrapolation changed, and rounding.
    """
    flat = vector(problem.lam)

    def value(shifted: Tensor) -> Tensor:
        lam = unvector(shifted, problem.lam)
        state = problem.step.init(problem.w0, lam)
        for t in range(horizon):
            state = problem.step(state, lam, problem.batches[t])
        loss = problem.outer_loss(state.w, lam, problem.outer_batch)
        return loss.detach()

    def central(h: float) -> Tensor:
        slopes = []
        for shift in h * torch.eye(flat.numel(), dtype=flat.dtype):
            above = value(flat + shift)
            below = value(flat - shift)
            slopes.append((above - below) / (2 * h))
        return torch.stack(slopes)

    coarse = central(radius)
    fine = central(radius / 2)
    better = fine + (fine - coarse) / 3
    changed = (better - fine).abs().max()

    size = float(value(flat).abs() + 1)
    rounding = torch.finfo(flat.dtype).eps * size / radius
    return Estimate(better, float(changed) + 10 * rounding)


def _flat(gradients: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> Tensor:
    """Gradients as one vector, zero where there is none."""
    parts = []
    for gradient, x in zip(gradients, inputs, strict=True):
        if gradient is None:
            gradient = torch.zeros_like(x)
        parts.append(gradient.reshape(-1))
    return torch.cat(parts)
