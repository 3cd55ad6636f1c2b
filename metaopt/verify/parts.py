"""Optimisers and linear solvers: updates against torch.optim, derivatives and solutions against dense ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from metaopt import tree
from metaopt.inner.step import inner_step
from metaopt.optim.optimizer import Optimizer
from metaopt.tree import Tree, vector
from metaopt.verify.report import Row, relative_error
from metaopt.verify.steps import check_step, derivative_rows
from metaopt.verify.tables import OPTIMIZERS, SOLVERS

STEPS = 5
TORCH = 1e-7
"""torch.optim keeps some of its schedules in float32."""


# -- optimisers ----------------------------------------------------------------------------------
def optimizer_rows(name: str) -> Iterator[Row]:
    """Each setting of one optimiser: its weights beside torch's, then every derivative at the first steps."""
    for case in OPTIMIZERS:
        if case.name.split(",")[0] != name:
            continue
        optimizer = case.make()
        if case.torch is not None:
            yield Row(case.name, "torch.optim", _beside_torch(optimizer, case.torch), TORCH, f"{STEPS} steps")
        yield from _prefixed(case.name, _derivatives(optimizer))
        if any(field.name == "lr" for field in fields(optimizer)):  # pyright: ignore[reportArgumentType]
            learned = replace(optimizer, lr=lambda lam, t: 0.1 * lam["a"].exp().mean())  # pyright: ignore
            yield from _prefixed(f"{case.name}, learned rate", _derivatives(learned))


def _prefixed(name: str, rows: Iterator[Row]) -> Iterator[Row]:
    for row in rows:
        yield row._replace(case=f"{name}: {row.case}")


def _derivatives(optimizer: Optimizer) -> Iterator[Row]:
    step = inner_step(_loss, optimizer)
    w, lam, x = _point()
    for row in check_step(step, w, lam, x).rows:
        if row.case in ("purity", "replay"):
            yield row
    state = step.init(w, lam)
    for t in range(1, 5):
        if t != 3:  # the first step is a special case in many optimisers, every second one in others
            for row in derivative_rows(step, state, lam, x, seed=t):
                if row.case != "uses lam":  # an accumulating optimiser does not in every step
                    yield row._replace(note=f"step {t}")
        state = step(state, lam, x)


def _beside_torch(optimizer: Optimizer, make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> float:
    w, lam, x = _point()
    step = inner_step(_loss, optimizer)
    state = step.init(w, lam)
    theirs = tree.map(lambda leaf: leaf.clone().requires_grad_(), w)
    torch_optimizer = make(tree.leaves(theirs))
    for _ in range(STEPS):
        state = step(state, lam, x)
        torch_optimizer.zero_grad()
        _loss(theirs, lam, x).backward()
        torch_optimizer.step()
    return relative_error(vector(state.w), vector(tree.detach(theirs)))


def _loss(w: Tree, lam: Tree, x: Tensor) -> Tensor:
    hidden = torch.tanh(x @ w["a"] + w["b"])
    weighted = hidden.square() * lam["b"].exp()
    penalty = torch.cosh(w["a"] - lam["a"])
    return weighted.sum() + 0.3 * penalty.sum()


def _point() -> tuple[Tree, Tree, Tensor]:
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    w = {"a": normal(3, 2), "b": normal(2)}
    lam = {"a": normal(3, 2), "b": 0.3 * normal(2)}
    x = normal(4, 3)
    return w, lam, x


# -- solvers -------------------------------------------------------------------------------------
def solver_rows(name: str) -> Iterator[Row]:
    """``x K = α`` for a symmetric positive K with eigenvalues in [½, 1½], beside ``torch.linalg.solve``."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    basis, _ = torch.linalg.qr(random)
    eigenvalues = torch.linspace(0.5, 1.5, 6, dtype=torch.float64)
    K = basis @ torch.diag(eigenvalues) @ basis.T
    alpha = torch.randn(6, generator=generator, dtype=torch.float64)
    want = torch.linalg.solve(K, alpha)

    for case in SOLVERS:
        if case.name.split(",")[0] != name:
            continue
        solver = case.make()
        found: Any = solver.solve(lambda v: {"x": v["x"] @ K}, {"x": alpha})
        x = found.x["x"]
        yield Row(case.name, "torch.linalg.solve", relative_error(x, want), case.tolerance)

        left = float((alpha - x @ K).norm() / alpha.norm())
        difference = abs(left - float(found.residual))
        yield Row(case.name, "its own residual", difference, max(case.tolerance, 1e-6))
