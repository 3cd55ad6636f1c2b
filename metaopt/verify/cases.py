r"""Closed forms: problems whose hypergradient is known at every horizon.

Outer loss where nothing else is said: :math:`\tfrac12 |w - b|^2` plus, where stated, a direct term;
so :math:`\alpha_T = w_T - b`. Each function returns a :class:`Case`; its docstring is the
derivation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metaopt.inner.contract import Step
from metaopt.inner.step import inner_step
from metaopt.optim.sgd import SGD
from metaopt.tree import Tree
from metaopt.verify.case import Case, Quadratic, draw_quadratic, identity


def quadratic(
    size: int = 4,
    conditioning: float = 5.0,
    seed: int = 0,
    horizon: int = 6,
    *,
    lr: float = 0.3,
    diagonal: bool = False,
) -> Case:
    r"""1. :math:`L = \tfrac12 (w-\lambda)^\top H (w-\lambda)`, gradient descent.

    :math:`w_t - \lambda = (I - \eta H)(w_{t-1} - \lambda)`, so :math:`w_T = \lambda + M (w_0 - \lambda)` and
    :math:`dw_T/d\lambda = I - M` with :math:`M = (I - \eta H)^T`.
    """
    q = draw_quadratic(size, conditioning, seed, diagonal=diagonal)
    contraction = identity(size) - lr * q.H

    def exact(T: int) -> Tensor:
        M = torch.linalg.matrix_power(contraction, T)
        return _hypergradient(M, q)

    step = inner_step(lambda w, lam, batch: _bowl(w - lam, q.H), SGD(lr=lr))
    name = "quadratic, diagonal" if diagonal else "quadratic"
    return _case(step, q, horizon, name=name, exact=exact, constant_jacobians=True)


def non_commuting(
    size: int = 4, conditioning: float = 5.0, seed: int = 0, horizon: int = 6, *, lr: float = 0.3
) -> Case:
    r"""1, with one Hessian per batch: :math:`dw_T/d\lambda = I - \prod_{t=T}^{1} (I - \eta H_t)`.

    The batch of step t is :math:`H_t`. These do not commute, so the product is in descending order.
    """
    q = draw_quadratic(size, conditioning, seed)
    batches = [draw_quadratic(size, conditioning, 1000 + seed + t).H for t in range(horizon)]

    def exact(T: int) -> Tensor:
        M = identity(size)
        for H in batches[:T]:
            M = (identity(size) - lr * H) @ M
        return _hypergradient(M, q)

    step = inner_step(lambda w, lam, H: _bowl(w - lam, H), SGD(lr=lr))
    case = _case(step, q, horizon, batches=batches, name="non-commuting Hessians", exact=exact)
    return replace(case, constant_jacobians=True)


def momentum(
    size: int = 4, conditioning: float = 5.0, seed: int = 0, horizon: int = 6, *, lr: float = 0.3, mu: float = 0.7
) -> Case:
    r"""2. Problem 1 with heavy-ball momentum.

    With :math:`e = w - \lambda` a step is :math:`v' = \mu v + H e,\; e' = e - \eta v'`. So each
    step multiplies :math:`(e, v)` by the same matrix M, and

    .. math::
        M = \begin{pmatrix} I-\eta H & -\eta\mu I \\ H & \mu I \end{pmatrix}, \qquad
        \frac{dw_T}{d\lambda} = I - (M^T)_{00}
    """
    q = draw_quadratic(size, conditioning, seed)
    eye = identity(size)
    upper = torch.cat([eye - lr * q.H, -lr * mu * eye], 1)
    lower = torch.cat([q.H, mu * eye], 1)
    M = torch.cat([upper, lower])

    def exact(T: int) -> Tensor:
        power = torch.linalg.matrix_power(M, T)
        return _hypergradient(power[:size, :size], q)

    step = inner_step(lambda w, lam, batch: _bowl(w - lam, q.H), SGD(lr=lr, momentum=mu))
    return _case(step, q, horizon, name="momentum", exact=exact, constant_jacobians=True)


def log_l2(
    size: int = 4, conditioning: float = 5.0, seed: int = 0, horizon: int = 6, *, lr: float = 0.2, direct: float = 0.3
) -> Case:
    r"""3. :math:`L = \tfrac12 \sum_i h_i (w_i-a_i)^2 + \tfrac12 \sum_i e^{\lambda_i} w_i^2`.

    The outer loss adds :math:`\tfrac{\rho}2 |\lambda|^2`. Per coordinate, with :math:`c = h +
    e^\lambda,\; r = 1 - \eta c,\; w^* = ha/c` and :math:`dc/d\lambda = e^\lambda`:

    .. math::
        w_T = w^* + r^T (w_0 - w^*), \qquad
        \frac{dw_T}{d\lambda} = e^\lambda \left[-\tfrac{ha}{c^2}(1 - r^T) - \eta T r^{T-1} (w_0 - w^*)\right]
    """
    q = draw_quadratic(size, conditioning, seed, diagonal=True)
    h = q.H.diagonal()
    a = q.lam
    lam = 0.3 * q.target

    def exact(T: int) -> Tensor:
        w_T, slope = _shrunk(h, a, lam.exp(), q.w0, lr, T)
        alpha = w_T - q.target
        return alpha * slope * lam.exp() + direct * lam

    def outer_loss(w: Tree, lam: Tree, batch: Any) -> Tensor:
        distance = 0.5 * ((w - q.target) ** 2).sum()
        return distance + 0.5 * direct * (lam**2).sum()

    step = inner_step(lambda w, lam, batch: _shrinking(w, h, a, lam.exp()), SGD(lr=lr))
    return _case(step, q, horizon, lam=lam, outer_loss=outer_loss, name="log-L2, direct term", exact=exact)


def learning_rate(
    size: int = 4, conditioning: float = 5.0, seed: int = 0, horizon: int = 6, *, lr: float = 0.3
) -> Case:
    r"""4. The learning rate: λ = η on :math:`L = \tfrac12 w^\top H w`.

    :math:`w_T = (I-\eta H)^T w_0`, so :math:`dw_T/d\eta = -T H (I-\eta H)^{T-1} w_0`.
    """
    q = draw_quadratic(size, conditioning, seed)
    contraction = identity(size) - lr * q.H

    def exact(T: int) -> Tensor:
        before = torch.linalg.matrix_power(contraction, T - 1) @ q.w0
        alpha = contraction @ before - q.target
        return -T * alpha @ q.H @ before

    step = inner_step(lambda w, lam, batch: _bowl(w, q.H), SGD(lr=lambda lam, t: lam))
    return _case(step, q, horizon, lam=torch.tensor(lr, dtype=torch.float64), name="learning rate", exact=exact)


def schedule(size: int = 4, conditioning: float = 5.0, seed: int = 0, horizon: int = 6) -> Case:
    r"""4b. One learning rate per step: :math:`dw_T/d\eta_t = -H \prod_{s \ne t} (I-\eta_s H)\, w_0`.

    The factors commute.
    """
    q = draw_quadratic(size, conditioning, seed)
    rates = torch.linspace(0.1, 0.5, horizon, dtype=torch.float64)

    def product(skip: int | None, T: int) -> Tensor:
        w = q.w0
        for s in range(T):
            if s != skip:
                w = w - rates[s] * (q.H @ w)
        return w

    def exact(T: int) -> Tensor:
        alpha = product(None, T) - q.target
        slopes = [torch.zeros((), dtype=torch.float64)] * horizon
        for t in range(T):
            slopes[t] = -alpha @ q.H @ product(t, T)
        return torch.stack(slopes)

    step = inner_step(lambda w, lam, batch: _bowl(w, q.H), SGD(lr=lambda lam, t: lam[t - 1]))
    return _case(step, q, horizon, lam=rates, name="schedule", exact=exact)


def ridge(size: int = 4, conditioning: float = 5.0, seed: int = 0, horizon: int = 6, *, lr: float = 0.3) -> Case:
    r"""5. :math:`L = \tfrac12 w^\top H w - b^\top w + \tfrac12 e^\lambda |w|^2`, started at its minimum.

    That is :math:`w^* = K^{-1} b` with :math:`K = H + e^\lambda`. Every state is :math:`w^*`, with
    :math:`A = I - \eta K,\; B = -\eta e^\lambda w^*`, so T steps give :math:`-\alpha (I - A^T)
    K^{-1} e^\lambda w^*`. The limit :math:`T \to \infty` is implicit differentiation's answer.
    """
    q = draw_quadratic(size, conditioning, seed)
    lam = torch.tensor(-0.5, dtype=torch.float64)
    K = q.H + lam.exp() * identity(size)
    minimum = torch.linalg.solve(K, q.w0)

    def exact(T: int) -> Tensor:
        alpha = minimum - q.target
        M = torch.linalg.matrix_power(identity(size) - lr * K, T)
        limit = torch.linalg.solve(K, lam.exp() * minimum)
        return -alpha @ (identity(size) - M) @ limit

    def inner_loss(w: Tree, lam: Tree, batch: Any) -> Tensor:
        fit = _bowl(w, q.H) - q.w0 @ w
        return fit + 0.5 * lam.exp() * (w @ w)

    step = inner_step(inner_loss, SGD(lr=lr))
    case = _case(step, q, horizon, w0=minimum, lam=lam, name="ridge at its minimum", exact=exact)
    return replace(case, constant_jacobians=True, converged=True)


def isotropic(size: int = 4, conditioning: float = 5.0, seed: int = 0, horizon: int = 6, *, lr: float = 0.2) -> Case:
    r"""7. :math:`L = \tfrac12 h |w-a|^2 + \tfrac12 \lambda |w|^2` with a single h: 3 without the exponential.

    h is :math:`1/` ``conditioning``. A is the number :math:`\gamma = 1 - \eta(h + \lambda)`, so
    :math:`\sum_i \gamma^{t-i} B_i` is a product with B at the γ-weighted mean of the weights:
    HyperDistill with that γ and θ = 1 is exact at every horizon.
    """
    q = draw_quadratic(size, conditioning, seed)
    h = torch.tensor(1.0 / conditioning, dtype=torch.float64)
    lam = torch.tensor(0.4, dtype=torch.float64)

    def exact(T: int) -> Tensor:
        w_T, slope = _shrunk(h, q.lam, lam, q.w0, lr, T)
        return (w_T - q.target) @ slope

    step = inner_step(lambda w, lam, batch: _shrinking(w, h, q.lam, lam), SGD(lr=lr))
    gamma = float(1.0 - lr * (h + lam))
    return _case(step, q, horizon, lam=lam, name="isotropic", exact=exact, contraction=gamma)


def population(size: int = 4, conditioning: float = 5.0, seed: int = 0, horizon: int = 6, *, lr: float = 0.2) -> Case:
    r"""6. EvoGrad's problem: inner :math:`c\,[(x-1)^2 + \lambda x^2]` per coordinate, outer :math:`(x-\tfrac12)^2`.

    The paper has one coordinate, with c = 1. The run starts at the minimum :math:`x^* =
    1/(1+\lambda)`, where :math:`dx^*/d\lambda = -x^{*2}`. At convergence the hypergradient is

    .. math:: 2 (x^* - \tfrac12) \cdot (-x^{*2}) = (\lambda-1)/(\lambda+1)^3,

    and T steps give the share :math:`1 - r^T` of it, with :math:`r = 1 - 2\eta c (1+\lambda)`.
    Bohdal et al. 2021, `arXiv 2106.10575 <https://arxiv.org/abs/2106.10575>`__.

    EvoGrad's own limit for infinitely many copies (Gaussian noise, σ = 1, τ = ½) is another number.
    :math:`x + \epsilon`, weighted by :math:`e^{-2\ell}`, is a product of Gaussians with mean θ, so
    that the hypergradient is :math:`2(\theta - \tfrac12)\, d\theta/d\lambda` with

    .. math::
        \theta = \frac{x + 4c}{1 + 4c(1+\lambda)}, \qquad
        \frac{d\theta}{d\lambda} = \frac{-4c\, \theta}{1 + 4c(1+\lambda)}.
    """
    q = draw_quadratic(size, conditioning, seed, diagonal=True)
    c = q.H.diagonal()
    lam = (0.5 * q.lam).exp()
    minimum = 1 / (1 + lam)

    def exact(T: int) -> Tensor:
        r = 1 - 2 * lr * c * (1 + lam)
        share = 1 - r**T
        return share * (lam - 1) / (lam + 1) ** 3

    def limit(T: int) -> Tensor:
        precision = 1 + 4 * c * (1 + lam)
        theta = (minimum + 4 * c) / precision
        slope = -4 * c * theta / precision
        return 2 * (theta - 0.5) * slope

    def inner_loss(x: Tree, lam: Tree, batch: Any) -> Tensor:
        return (c * ((x - 1) ** 2 + lam * x**2)).sum()

    def outer_loss(x: Tree, lam: Tree, batch: Any) -> Tensor:
        return ((x - 0.5) ** 2).sum()

    step = inner_step(inner_loss, SGD(lr=lr))
    case = _case(step, q, horizon, w0=minimum, lam=lam, outer_loss=outer_loss, name="EvoGrad's", exact=exact)
    return replace(case, constant_jacobians=True, converged=True, evograd_limit=limit)


def drifting(
    size: int = 4,
    conditioning: float = 5.0,
    seed: int = 0,
    horizon: int = 6,
    *,
    lr: float = 0.3,
    window: int = 2,
    drift: float = 0.1,
) -> Case:
    r"""8. FDS's setting: :math:`L_t = \tfrac12 k |w|^2 - \lambda_{i(t)}\, c_t \cdot w`, one λ per window.

    :math:`c_t` drifts along the run. With :math:`r = 1 - \eta k`

    .. math::
        w_T = r^T w_0 + \eta \sum_t r^{T-t} \lambda_{i(t)} c_t, \qquad
        \frac{dw_T}{d\lambda_i} = \eta \sum_{t \in i} r^{T-t} c_t.

    For k = 0 the steps of a window contribute :math:`\eta\, \alpha c_t`: noisy measurements with
    linear drift. Their mean has the error of :func:`metaopt.estimators.fds.shared_window_error`.
    Micaelli & Storkey 2021, `arXiv 2007.07869 <https://arxiv.org/abs/2007.07869>`__.
    """
    q = draw_quadratic(size, conditioning, seed)
    k = 1 / conditioning
    r = 1 - lr * k
    windows = -(-horizon // window)
    lam = 0.5 + 0.5 * torch.sin(q.lam[0] + torch.arange(windows, dtype=torch.float64))
    direction = q.H @ q.target
    batches = [(t // window, q.lam + drift * t * direction) for t in range(horizon)]

    def exact(T: int) -> Tensor:
        slopes = torch.zeros(windows, size, dtype=torch.float64)
        for t, (i, c) in enumerate(batches[:T], start=1):
            slopes[i] += lr * r ** (T - t) * c
        w_T = r**T * q.w0 + lam @ slopes
        return slopes @ (w_T - q.target)

    def inner_loss(w: Tree, lam: Tree, batch: tuple[int, Tensor]) -> Tensor:
        i, c = batch
        return 0.5 * k * (w @ w) - lam[i] * (c @ w)

    step = inner_step(inner_loss, SGD(lr=lr))
    case = _case(step, q, horizon, lam=lam, batches=batches, name="drifting, shared", exact=exact)
    return replace(case, constant_jacobians=True)


CLOSED_FORMS: list[Callable[..., Case]] = [
    quadratic,
    non_commuting,
    momentum,
    log_l2,
    learning_rate,
    schedule,
    ridge,
    isotropic,
    population,
    drifting,
]
"""Every closed form at horizon T: functions of ``(size, conditioning, seed, horizon)``."""


def _case(step: Step, q: Quadratic, horizon: int, **given: Any) -> Case:
    """A run from ``q.w0``, without batches, judged by its distance from the target; ``given`` replaces any of it."""

    def outer_loss(w: Tree, lam: Tree, batch: Any) -> Tensor:
        return 0.5 * ((w - q.target) ** 2).sum()

    usual = {"outer_loss": outer_loss, "w0": q.w0, "lam": q.lam, "batches": [None] * horizon}
    return Case(step, **(usual | given))


def _hypergradient(M: Tensor, q: Quadratic) -> Tensor:
    """The hypergradient where ``w_T = λ + M (w_0 - λ)``."""
    w_T = q.lam + M @ (q.w0 - q.lam)
    alpha = w_T - q.target
    slope = identity(len(M)) - M
    return slope.T @ alpha


def _shrunk(h: Tensor, a: Tensor, penalty: Tensor, w0: Tensor, lr: float, T: int) -> tuple[Tensor, Tensor]:
    """``w_T`` of gradient descent on ``½h(w-a)² + ½ penalty w²``, and its derivative by the penalty."""
    c = h + penalty
    r = 1 - lr * c
    minimum = h * a / c
    offset = w0 - minimum
    by_minimum = -h * a / c**2 * (1 - r**T)
    by_rate = lr * T * r ** (T - 1) * offset
    return minimum + r**T * offset, by_minimum - by_rate


def _shrinking(w: Tensor, h: Tensor, a: Tensor, penalty: Tensor) -> Tensor:
    fit = 0.5 * (h * (w - a) ** 2).sum()
    return fit + 0.5 * (penalty * w**2).sum()


def _bowl(x: Tensor, H: Tensor) -> Tensor:
    return 0.5 * x @ H @ x
