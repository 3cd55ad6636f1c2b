"""Formulas of the estimators that draw noise, or take the outer loss at other weights, written out over flattened λ.

The noise is drawn here again, from the estimator's seed: one draw per inner step (and pair, or
sketch), a leaf at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaopt import tree
from metaopt.estimators import BOME, F2SA, PES, UORO, EvoGrad, TruncatedES
from metaopt.estimators.evolution import Evolution
from metaopt.inner.state import InnerState
from metaopt.inner.step import InnerStep
from metaopt.tree import Tree
from metaopt.verify.cases import Case
from metaopt.verify.reference import along, outer_cotangent, states, unvector, vector


class Mirrored(NamedTuple):
    """One run of a pair.

    The step it starts after, the noise it sees in each step from there on, and what its difference
    is weighed with.
    """

    start: int
    epsilons: list[Tensor]
    xi: Tensor


# -- populations of weights ----------------------------------------------------------------------
def evograd(problem: Case, horizon: int, estimator: EvoGrad) -> Tensor:
    r"""``∂L_val/∂λ + Σ_k (α · θ_k) ∂p_k/∂λ`` at ``θ* = Σ_k p_k θ_k``.

    With :math:`p = \mathrm{softmax}(-\ell/\tau)`: :math:`\partial p_k = -p_k (\partial \ell_k -
    \sum_j p_j\, \partial \ell_j) / \tau`.
    """
    run = states(problem, horizon)
    generator = torch.Generator().manual_seed(estimator.seed)
    draws = [noise(problem.w0, estimator.noise, generator, estimator.copies) for _ in range(horizon)]
    base = run[horizon - 1 if estimator.around == "before" else horizon].w
    copies = vector(base) + estimator.sigma * draws[-1]
    values = [_inner_loss(problem, unvector(copy, base), horizon) for copy in copies]
    losses = torch.stack([loss for loss, _ in values])
    slopes = torch.stack([slope for _, slope in values])
    weights = (-losses / estimator.temperature).exp()
    weights = weights / weights.sum()
    changes = -weights[:, None] * (slopes - weights @ slopes) / estimator.temperature
    theta = unvector(weights @ copies, base)
    alpha, direct = outer_cotangent(problem.outer_loss, InnerState(theta), problem.lam, problem.outer_batch)
    scale = 1 / estimator.effective_rate if estimator.unit_rate else 1.0
    return direct + scale * ((copies @ alpha) @ changes)


# -- a second run --------------------------------------------------------------------------------
def f2sa(problem: Case, horizon: int, estimator: F2SA) -> Tensor:
    """``∂L_val/∂λ(y) + κ (∂L/∂λ(y) - ∂L/∂λ(w))``, where y descends ``L + L_val/κ`` beside w."""
    step = problem.step
    lam = problem.lam
    kappa = estimator.multiplier
    assert isinstance(step, InnerStep)
    y = problem.w0
    for t in range(horizon):
        with torch.enable_grad():
            y_ = tree.attach(y)
            loss = (
                step.inner_loss(y_, lam, problem.batches[t]) + problem.outer_loss(y_, lam, problem.outer_batch) / kappa
            )
            (g,) = torch.autograd.grad(loss, y_)
        y = y - estimator.rate * g
    _, direct = outer_cotangent(problem.outer_loss, InnerState(y), lam, problem.outer_batch)
    return direct + kappa * (
        _inner_loss(problem, y, horizon)[1] - _inner_loss(problem, states(problem, horizon)[-1].w, horizon)[1]
    )


def bome(problem: Case, horizon: int, estimator: BOME) -> Tensor:
    """The λ part of ``∇L_val + κ ∇q`` over ``z = (y, λ)``, where ``q = L(y, λ) - L(w_t, λ)``.

    Step by step, y takes the y part of it.
    """
    step = problem.step
    run = states(problem, horizon)
    n = vector(problem.w0).numel()
    assert isinstance(step, InnerStep)
    z = move = torch.cat([vector(problem.w0), vector(problem.lam)])
    for t in range(1, horizon + 1):
        w = tree.detach(run[t].w)

        def split(z: Tensor) -> tuple[Tree, Tree]:
            return unvector(z[:n], problem.w0), unvector(z[n:], problem.lam)

        def q(z: Tensor, w: Tree = w, batch: Any = problem.batches[t - 1]) -> Tensor:
            y, lam = split(z)
            return step.inner_loss(y, lam, batch) - step.inner_loss(w, lam, batch)

        f = torch.func.grad(lambda z: problem.outer_loss(*split(z), problem.outer_batch))(z)
        slope = torch.func.grad(q)(z)
        kappa = max(estimator.eta - float(f @ slope / (slope @ slope)), 0.0)
        move = f + kappa * slope
        if t < horizon:
            z = torch.cat([z[:n] - estimator.rate * move[:n], z[n:]])
    return move[n:]


# -- mirrored runs -------------------------------------------------------------------------------
def one_noise(estimator: Evolution, noise: list[Tensor]) -> Mirrored:
    """AntitheticES, NRES: the first step's noise in every step."""
    return Mirrored(0, [noise[0]] * len(noise), noise[0])


def restarted(estimator: TruncatedES, noise: list[Tensor]) -> Mirrored:
    """TruncatedES: from the nominal state at the last multiple of the window, with that step's noise."""
    start = (len(noise) - 1) // estimator.window * estimator.window
    return Mirrored(start, [noise[start]] * (len(noise) - start), noise[start])


def persistent(estimator: PES, noise: list[Tensor]) -> Mirrored:
    """PES: new noise every window; ξ is the sum over windows."""
    fresh = noise[:: estimator.window]
    return Mirrored(0, [fresh[t // estimator.window] for t in range(len(noise))], torch.stack(fresh).sum(0))


def evolution(schedule: Callable[[Any, list[Tensor]], Mirrored]) -> Callable[[Case, int, Any], Tensor]:
    r"""Values of the outer loss at mirrored noise, written out.

    .. math::
        \frac1N \sum_k \xi_k\,
        \frac{L_{val}(w_k^+, \lambda + \sigma\varepsilon_k) - L_{val}(w_k^-, \lambda - \sigma\varepsilon_k)}{2\sigma}
    """

    def hypergradient(problem: Case, horizon: int, estimator: Evolution) -> Tensor:
        generator = torch.Generator().manual_seed(estimator.seed)
        drawn = [[noise(problem.lam, "gaussian", generator) for _ in range(estimator.pairs)] for _ in range(horizon)]
        run = states(problem, horizon)
        total = torch.zeros_like(vector(problem.lam))
        for k in range(estimator.pairs):
            mirrored = schedule(estimator, [of_step[k] for of_step in drawn])
            above, below = (_perturbed_loss(problem, run, mirrored, sign * estimator.sigma) for sign in (1, -1))
            total += mirrored.xi * (above - below) / (2 * estimator.sigma) / estimator.pairs
        return total

    return hypergradient


def _perturbed_loss(problem: Case, run: list[InnerState], mirrored: Mirrored, sigma: float) -> Tensor:
    state = run[mirrored.start]
    lam = problem.lam
    for t, epsilon in enumerate(mirrored.epsilons, start=mirrored.start):
        lam = unvector(vector(problem.lam) + sigma * epsilon, problem.lam)
        state = problem.step(state, lam, problem.batches[t])
    return problem.outer_loss(state.w, lam, problem.outer_batch).detach()


# -- a random sketch -----------------------------------------------------------------------------
def uoro(problem: Case, horizon: int, estimator: UORO, alpha: Tensor) -> Tensor:
    r"""Mean over the sketches of :math:`(\alpha \tilde s)\, \tilde\theta`.

    :math:`\tilde s \leftarrow \rho_0 A\tilde s + \rho_1\nu` and
    :math:`\tilde\theta \leftarrow \tilde\theta/\rho_0 + \nu B/\rho_1` with
    :math:`\rho_0^2 = |\tilde\theta|/|A\tilde s|`, :math:`\rho_1^2 = |\nu B|/|\nu|` (1 where either norm is 0).
    """
    generator = torch.Generator().manual_seed(estimator.seed)
    run = states(problem, horizon)
    sketches = [
        (torch.zeros_like(vector(run[0])), torch.zeros_like(vector(problem.lam))) for _ in range(estimator.sketches)
    ]
    for A, B in along(problem, run, horizon):
        for k, (s, theta) in enumerate(sketches):
            nu = noise(run[0], "sign", generator)
            old = _ratio(theta, A @ s)
            fresh = _ratio(nu @ B, nu)
            sketches[k] = (old * (A @ s) + fresh * nu, theta / old + (nu @ B) / fresh)
    return torch.stack([(alpha @ s) * theta for s, theta in sketches]).mean(0)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    defined = bool(above.any()) and bool(below.any())
    return (above.norm() / below.norm()).sqrt() if defined else torch.ones((), dtype=above.dtype)


# -- parts ---------------------------------------------------------------------------------------
def noise(like: Tree, law: str, generator: torch.Generator, copies: int | None = None) -> Tensor:
    """Noise like a pytree, flattened (``[copies, n]`` where there are copies)."""
    drawn = []
    for leaf in tree.floats(like):
        shape = leaf.shape if copies is None else (copies, *leaf.shape)
        sign = law == "sign"
        leaf_noise = (
            2.0 * torch.randint(0, 2, shape, generator=generator) - 1
            if sign
            else torch.randn(shape, generator=generator, dtype=leaf.dtype)
        )
        drawn.append(
            leaf_noise.to(leaf.dtype).reshape(-1) if copies is None else leaf_noise.to(leaf.dtype).reshape(copies, -1)
        )
    return torch.cat(drawn, -1)


def _inner_loss(problem: Case, w: Tree, horizon: int) -> tuple[Tensor, Tensor]:
    """The inner loss at ``w`` on the last batch, and its gradient over flattened λ."""
    assert isinstance(problem.step, InnerStep)
    with torch.enable_grad():
        lam = tree.attach(problem.lam)
        loss = problem.step.inner_loss(tree.detach(w), lam, problem.batches[horizon - 1])
        gradients = torch.autograd.grad(loss, tree.floats(lam))
    return loss.detach(), vector(list(gradients))
