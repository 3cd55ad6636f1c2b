"""Each estimator's own formula, written out with dense matrices.

An estimator is held to its formula, whether or not that is the true hypergradient.

To verify a new estimator, add one row to :data:`ENTRIES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaopt import tree
from metaopt.estimators import (
    BOME,
    DARTS,
    F2SA,
    FDS,
    FMD,
    IFT,
    NRES,
    PES,
    RMD,
    SAMA,
    SOBA,
    UORO,
    AntitheticES,
    DrMAD,
    Estimator,
    EvoGrad,
    FirstOrder,
    ForwardGradient,
    HyperDistill,
    OneStep,
    TruncatedES,
    TruncatedRMD,
)
from metaopt.inner.step import InnerStep
from metaopt.linsolve import Identity, Neumann, PowerIteration
from metaopt.verify import sampled
from metaopt.verify.case import Case
from metaopt.verify.reference import along, dense_sweep, jacobians, outer_cotangent, states, vector


class Formula(NamedTuple):
    """One estimator's own hypergradient, as a direct term (that of the last weights) and its indirect term.

    Attributes:
        make: problem and horizon to the estimator as it is verified.
        indirect: ``(problem, horizon, estimator, alpha)`` to the indirect term over flattened λ,
            from dense matrices alone.
        exact_where: whether theory makes it the true hypergradient on this problem, and why;
            ``None`` where it does not.
        unless: why the formula cannot be evaluated on this problem; ``None`` where it can.
    """

    make: Callable[[Case, int], Estimator]
    indirect: Callable[[Case, int, Any, Tensor], Tensor]
    exact_where: Callable[[Case, int, Any], str | None]
    unless: Callable[[Case], str | None] = lambda problem: None

    def hypergradient(self, problem: Case, horizon: int, estimator: Estimator) -> Tensor:
        """Both terms, over flattened λ."""
        last = states(problem, horizon)[-1]
        alpha, direct = outer_cotangent(problem.outer_loss, last, problem.lam, problem.outer_batch)
        indirect = self.indirect(problem, horizon, estimator, alpha)
        return direct + indirect


class WholeFormula(NamedTuple):
    """One estimator's own hypergradient as a whole, where its two terms cannot be told apart.

    Attributes:
        make: problem and horizon to the estimator as it is verified.
        total: ``(problem, horizon, estimator)`` to the hypergradient over flattened λ.
        exact_where: as for :class:`Formula`.
        unless: as for :class:`Formula`.
    """

    make: Callable[[Case, int], Estimator]
    total: Callable[[Case, int, Any], Tensor]
    exact_where: Callable[[Case, int, Any], str | None]
    unless: Callable[[Case], str | None] = lambda problem: None

    def hypergradient(self, problem: Case, horizon: int, estimator: Estimator) -> Tensor:
        """Both terms, over flattened λ."""
        return self.total(problem, horizon, estimator)


def _first_order(problem: Case, horizon: int, estimator: FirstOrder, alpha: Tensor) -> Tensor:
    return torch.zeros_like(vector(problem.lam))


def _all_steps(problem: Case, horizon: int, estimator: Estimator, alpha: Tensor) -> Tensor:
    return _last_steps(problem, horizon, alpha, last=horizon)


def _last_steps(problem: Case, horizon: int, alpha: Tensor, *, last: int) -> Tensor:
    run = states(problem, horizon)
    steps = along(problem, run, horizon, last=last)
    return dense_sweep(alpha, steps)


def _shared(problem: Case, horizon: int, estimator: FDS) -> Tensor:
    """Both terms divided by the window."""
    last = states(problem, horizon)[-1]
    alpha, direct = outer_cotangent(problem.outer_loss, last, problem.lam, problem.outer_batch)
    indirect = _all_steps(problem, horizon, estimator, alpha)
    return (direct + indirect) / estimator.window


def _one_step(problem: Case, horizon: int, estimator: OneStep, alpha: Tensor) -> Tensor:
    return _last_steps(problem, horizon, alpha, last=1)


def _truncated(problem: Case, horizon: int, estimator: TruncatedRMD, alpha: Tensor) -> Tensor:
    if estimator.steps == 0:
        return torch.zeros_like(vector(problem.lam))
    return _last_steps(problem, horizon, alpha, last=estimator.steps)


def _straight_line(problem: Case, horizon: int, estimator: DrMAD, alpha: Tensor) -> Tensor:
    run = states(problem, horizon)
    first = run[0]
    last = run[-1]
    line = []
    for t in range(horizon):
        part = t / horizon
        of_first = tree.scale(1 - part, first)
        of_last = tree.scale(part, last)
        between = tree.add(of_first, of_last)
        line.append(between._replace(t=t))
    steps = along(problem, line, horizon)
    return dense_sweep(alpha, steps)


def _implicit(problem: Case, horizon: int, estimator: IFT, alpha: Tensor) -> Tensor:
    """``-a Σ_j α (I - aH)^j ∂²L/∂w∂λ``, or ``-α (H + ρI)^{-1} ∂²L/∂w∂λ``, at the last weights.

    Both derivatives come from the loss itself.
    """
    solver = estimator.solver
    H, mixed = _at_the_end(problem, horizon)
    alpha = alpha[: len(H)]
    eye = torch.eye(len(H), dtype=H.dtype)
    H = H + getattr(solver, "damping", 0.0) * eye
    if not isinstance(solver, (Neumann, Identity)):
        solution = torch.linalg.solve(H, alpha)
        return -solution @ mixed

    rate = solver.rate
    if isinstance(rate, PowerIteration):
        spectrum = rate.spectrum(lambda v: v @ H, alpha)
        rate = spectrum.rate
    elif rate is None:
        rate = _rate(problem)

    terms = solver.terms if isinstance(solver, Neumann) else 0
    total = alpha
    power = alpha
    for _ in range(terms):
        power = power - rate * (power @ H)
        total = total + power
    return -rate * (total @ mixed)


def _preconditioned(problem: Case, horizon: int, estimator: SAMA, alpha: Tensor) -> Tensor:
    """``-η α ∂²L/∂w∂λ`` at the last weights.

    SGD's preconditioner is its rate (the finite difference has no error on a quadratic).
    """
    H, mixed = _at_the_end(problem, horizon)
    rate = _rate(problem)
    alpha_w = alpha[: len(H)]
    return -rate * (alpha_w @ mixed)


def _single_loop(problem: Case, horizon: int, estimator: SOBA, alpha: Tensor) -> Tensor:
    """``v_T ∂²L/∂w∂λ`` with ``v_t = v_{t-1} - ρ (H_t v_{t-1} + α_t)``, everything at ``w_t`` and batch t."""
    run = states(problem, horizon)
    v = torch.zeros_like(vector(problem.w0))
    mixed = None
    for t in range(1, horizon + 1):
        alpha_t, _ = outer_cotangent(problem.outer_loss, run[t], problem.lam, problem.outer_batch)
        H, mixed = _second_derivatives(problem, run[t].w, problem.batches[t - 1])
        residual = H @ v + alpha_t[: len(H)]
        v = v - estimator.rate * residual
    assert mixed is not None
    return v @ mixed


def _projected(problem: Case, horizon: int, estimator: ForwardGradient, alpha: Tensor) -> Tensor:
    """The mean of ``(g · v) v`` over the directions, with g the exact indirect term."""
    g = _all_steps(problem, horizon, estimator, alpha)
    generator = torch.Generator().manual_seed(estimator.seed)
    drawn = [sampled.noise(problem.lam, estimator.noise, generator) for _ in range(estimator.directions)]
    directions = torch.stack(drawn)
    lengths = directions @ g
    return lengths @ directions / len(directions)


def _at_the_end(problem: Case, horizon: int) -> tuple[Tensor, Tensor]:
    """``H`` and ``∂²L/∂w∂λ`` at the last weights, on the last batch."""
    last = states(problem, horizon)[-1]
    batch = problem.batches[horizon - 1]
    return _second_derivatives(problem, last.w, batch)


def _second_derivatives(problem: Case, w: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    """``H`` and ``∂²L/∂w∂λ`` [|w|, |λ|] of the inner loss itself."""
    step = problem.step
    assert isinstance(step, InnerStep)

    def loss(w: Tensor, lam: Tensor) -> Tensor:
        return step.inner_loss(w, lam, batch)

    rows_of_w, _ = torch.autograd.functional.hessian(loss, (w, problem.lam))
    H, mixed = rows_of_w
    return H, mixed.reshape(len(H), -1)


def _rate(problem: Case) -> float:
    optimizer = getattr(problem.step, "optimizer", None)
    return getattr(optimizer, "lr", float("nan"))


def _distilled(problem: Case, horizon: int, estimator: HyperDistill, alpha: Tensor) -> Tensor:
    """``θ Σ_i γ^{t-i} · α B(w*)`` with ``w*`` the γ-weighted mean of ``s_0 … s_{t-1}``; one batch, repeated."""
    run = states(problem, horizon)
    weights = [estimator.gamma ** (horizon - i) for i in range(1, horizon + 1)]
    total = sum(weights)

    mean = tree.scale(0.0, run[0])
    for weight, state in zip(weights, run[:-1], strict=True):
        part = tree.scale(weight / total, state)
        mean = tree.add(mean, part)
    mean = mean._replace(t=horizon - 1)

    batch = problem.batches[horizon - 1]
    point = jacobians(problem.step, mean, problem.lam, batch)
    return estimator.theta * total * (alpha @ point.B)


def _never(problem: Case, horizon: int, estimator: Any) -> str | None:
    return None


def _always(problem: Case, horizon: int, estimator: Any) -> str | None:
    return "exact"


def _when_complete(problem: Case, horizon: int, estimator: Any) -> str | None:
    steps = getattr(estimator, "horizon", 1)
    return "T ≤ K" if horizon <= steps else None


def _when_alone(problem: Case, horizon: int, estimator: FDS) -> str | None:
    alone = estimator.window == 1 and estimator.bound is None
    return "W = 1, no bound" if alone else None


def _when_single(problem: Case, horizon: int, estimator: ForwardGradient) -> str | None:
    single = vector(problem.lam).numel() == 1
    signs = estimator.noise == "sign"
    return "one hyperparameter, signs" if single and signs else None


def _when_constant(problem: Case, horizon: int, estimator: DrMAD) -> str | None:
    if problem.constant_jacobians:
        return "A, B constant"
    if horizon == 1:
        return "T = 1"
    return None


def _when_series(problem: Case, horizon: int, estimator: IFT) -> str | None:
    solver = estimator.solver
    full = isinstance(solver, Neumann) and solver.terms == horizon - 1
    if problem.converged and full:
        return "converged, N = T-1"
    return None


def _when_isotropic(problem: Case, horizon: int, estimator: HyperDistill) -> str | None:
    if estimator.theta != 1.0:
        return None
    if horizon == 1:
        return "T = 1"
    if problem.contraction == estimator.gamma:
        return "isotropic"
    return None


def _many_batches(problem: Case) -> str | None:
    """The formula averages states; what it would average batches to is random."""
    same = all(batch is problem.batches[0] for batch in problem.batches)
    return None if same else "the formula is for one batch that repeats"


def _learned_rate(problem: Case) -> str | None:
    """Methods that differentiate only the loss cannot see a learning rate."""
    optimizer = getattr(problem.step, "optimizer", None)
    fixed = isinstance(getattr(optimizer, "lr", None), float)
    return None if fixed else "λ is the learning rate, which the method cannot see: it differentiates the loss alone"


ENTRIES: dict[type[Estimator], Formula | WholeFormula] = {
    FirstOrder: Formula(lambda p, T: FirstOrder(), _first_order, _never),
    OneStep: Formula(lambda p, T: OneStep(), _one_step, _when_complete),
    TruncatedRMD: Formula(lambda p, T: TruncatedRMD(3), _truncated, _when_complete),
    RMD: Formula(lambda p, T: RMD(), _all_steps, _always),
    FMD: Formula(lambda p, T: FMD(), _all_steps, _always),
    FDS: WholeFormula(lambda p, T: FDS(window=T), _shared, _when_alone),
    DrMAD: Formula(lambda p, T: DrMAD(), _straight_line, _when_constant),
    IFT: Formula(lambda p, T: IFT(Neumann(T - 1), solved=None), _implicit, _when_series, _learned_rate),
    HyperDistill: Formula(
        lambda p, T: HyperDistill(gamma=p.contraction or 0.8), _distilled, _when_isotropic, _many_batches
    ),
    ForwardGradient: Formula(lambda p, T: ForwardGradient(directions=2), _projected, _when_single),
    DARTS: Formula(lambda p, T: DARTS(), _one_step, _when_complete),
    SAMA: Formula(lambda p, T: SAMA(), _preconditioned, _never, _learned_rate),
    SOBA: Formula(lambda p, T: SOBA(rate=0.1), _single_loop, _never, _learned_rate),
    F2SA: WholeFormula(lambda p, T: F2SA(rate=0.2, multiplier=10.0), sampled.f2sa, _never, _learned_rate),
    BOME: WholeFormula(lambda p, T: BOME(rate=0.05), sampled.bome, _never, _learned_rate),
    EvoGrad: WholeFormula(
        lambda p, T: EvoGrad(copies=3, sigma=0.3, temperature=0.5), sampled.evograd, _never, _learned_rate
    ),
    AntitheticES: WholeFormula(lambda p, T: AntitheticES(pairs=2), sampled.evolution(sampled.one_noise), _never),
    NRES: WholeFormula(lambda p, T: NRES(pairs=2), sampled.evolution(sampled.one_noise), _never),
    TruncatedES: WholeFormula(
        lambda p, T: TruncatedES(pairs=2, window=4), sampled.evolution(sampled.restarted), _never
    ),
    PES: WholeFormula(lambda p, T: PES(pairs=2, window=4), sampled.evolution(sampled.persistent), _never),
    UORO: Formula(lambda p, T: UORO(sketches=2), sampled.uoro, _never),
}
"""Estimator class to its formula: one row each."""


def formula_of(estimator: Estimator | type[Estimator]) -> Formula | WholeFormula | None:
    """The row of an estimator's class, or of the nearest base class that has one."""
    kind = estimator if isinstance(estimator, type) else type(estimator)
    for base in kind.__mro__:
        if base in ENTRIES:
            return ENTRIES[base]
    return None
