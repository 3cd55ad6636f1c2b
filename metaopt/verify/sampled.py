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
from metaopt.verify.case import Case
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
    number = horizon - 1 if estimator.around == "before" else horizon
    base = run[number].w

    generator = torch.Generator().manual_seed(estimator.seed)
    draws = [noise(problem.w0, estimator.noise, generator, estimator.copies) for _ in range(horizon)]
    copies = vector(base) + estimator.sigma * draws[-1]

    losses = []
    slopes = []
    for copy in copies:
        loss, slope = _inner_loss(problem, unvector(copy, base), horizon)
        losses.append(loss)
        slopes.append(slope)

    fitness = -torch.stack(losses) / estimator.temperature
    weights = fitness.exp()
    weights = weights / weights.sum()
    theta = unvector(weights @ copies, base)

    slopes = torch.stack(slopes)
    excess = slopes - weights @ slopes
    changes = -weights[:, None] * excess / estimator.temperature

    alpha, direct = outer_cotangent(problem.outer_loss, InnerState(theta), problem.lam, problem.outer_batch)
    indirect = (copies @ alpha) @ changes
    if estimator.unit_rate:
        indirect = indirect / estimator.effective_rate
    return direct + indirect


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
            inner = step.inner_loss(y_, lam, problem.batches[t])
            outer = problem.outer_loss(y_, lam, problem.outer_batch)
            (g,) = torch.autograd.grad(inner + outer / kappa, y_)
        y = y - estimator.rate * g

    last = states(problem, horizon)[-1]
    _, direct = outer_cotangent(problem.outer_loss, InnerState(y), lam, problem.outer_batch)
    _, at_y = _inner_loss(problem, y, horizon)
    _, at_w = _inner_loss(problem, last.w, horizon)
    return direct + kappa * (at_y - at_w)


def bome(problem: Case, horizon: int, estimator: BOME) -> Tensor:
    """The λ part of ``∇L_val + κ ∇q`` over ``z = (y, λ)``, where ``q = L(y, λ) - L(w_t, λ)``.

    Step by step, y takes the y part of it.
    """
    step = problem.step
    run = states(problem, horizon)
    n = vector(problem.w0).numel()
    assert isinstance(step, InnerStep)
    z = torch.cat([vector(problem.w0), vector(problem.lam)])
    move = z

    def split(z: Tensor) -> tuple[Tree, Tree]:
        y = unvector(z[:n], problem.w0)
        lam = unvector(z[n:], problem.lam)
        return y, lam

    def outer(z: Tensor) -> Tensor:
        y, lam = split(z)
        return problem.outer_loss(y, lam, problem.outer_batch)

    for t in range(1, horizon + 1):
        w = tree.detach(run[t].w)
        batch = problem.batches[t - 1]

        def q(z: Tensor, w: Tree = w, batch: Any = batch) -> Tensor:
            y, lam = split(z)
            at_y = step.inner_loss(y, lam, batch)
            at_w = step.inner_loss(w, lam, batch)
            return at_y - at_w

        f = torch.func.grad(outer)(z)
        slope = torch.func.grad(q)(z)
        overlap = float(f @ slope / (slope @ slope))
        kappa = max(estimator.eta - overlap, 0.0)
        move = f + kappa * slope
        if t < horizon:
            y = z[:n] - estimator.rate * move[:n]
            z = torch.cat([y, z[n:]])
    return move[n:]


# -- mirrored runs -------------------------------------------------------------------------------
def one_noise(estimator: Evolution, noise: list[Tensor]) -> Mirrored:
    """AntitheticES, NRES: the first step's noise in every step."""
    first = noise[0]
    return Mirrored(start=0, epsilons=[first] * len(noise), xi=first)


def restarted(estimator: TruncatedES, noise: list[Tensor]) -> Mirrored:
    """TruncatedES: from the nominal state at the last multiple of the window, with that step's noise."""
    windows_before = (len(noise) - 1) // estimator.window
    start = windows_before * estimator.window
    steps = len(noise) - start
    return Mirrored(start, epsilons=[noise[start]] * steps, xi=noise[start])


def persistent(estimator: PES, noise: list[Tensor]) -> Mirrored:
    """PES: new noise every window; ξ is the sum over windows."""
    fresh = noise[:: estimator.window]
    epsilons = [fresh[t // estimator.window] for t in range(len(noise))]
    xi = torch.stack(fresh).sum(0)
    return Mirrored(0, epsilons, xi)


def evolution(schedule: Callable[[Any, list[Tensor]], Mirrored]) -> Callable[[Case, int, Any], Tensor]:
    r"""Values of the outer loss at mirrored noise, written out.

    .. math::
        \frac1N \sum_k \xi_k\,
        \frac{L_{val}(w_k^+, \lambda + \sigma\varepsilon_k) - L_{val}(w_k^-, \lambda - \sigma\varepsilon_k)}{2\sigma}
    """

    def hypergradient(problem: Case, horizon: int, estimator: Evolution) -> Tensor:
        pairs = estimator.pairs
        sigma = estimator.sigma
        generator = torch.Generator().manual_seed(estimator.seed)
        draws = [noise(problem.lam, "gaussian", generator) for _ in range(horizon * pairs)]

        run = states(problem, horizon)
        total = torch.zeros_like(vector(problem.lam))
        for k in range(pairs):
            of_pair = draws[k::pairs]
            mirrored = schedule(estimator, of_pair)
            above = _perturbed_loss(problem, run, mirrored, sigma)
            below = _perturbed_loss(problem, run, mirrored, -sigma)
            total += mirrored.xi * (above - below) / (2 * sigma) / pairs
        return total

    return hypergradient


def _perturbed_loss(problem: Case, run: list[InnerState], mirrored: Mirrored, sigma: float) -> Tensor:
    state = run[mirrored.start]
    lam = problem.lam
    for t, epsilon in enumerate(mirrored.epsilons, start=mirrored.start):
        shifted = vector(problem.lam) + sigma * epsilon
        lam = unvector(shifted, problem.lam)
        state = problem.step(state, lam, problem.batches[t])
    loss = problem.outer_loss(state.w, lam, problem.outer_batch)
    return loss.detach()


# -- a random sketch -----------------------------------------------------------------------------
def uoro(problem: Case, horizon: int, estimator: UORO, alpha: Tensor) -> Tensor:
    r"""Mean over the sketches of :math:`(\alpha \tilde s)\, \tilde\theta`.

    :math:`\tilde s \leftarrow \rho_0 A\tilde s + \rho_1\nu` and
    :math:`\tilde\theta \leftarrow \tilde\theta/\rho_0 + \nu B/\rho_1` with
    :math:`\rho_0^2 = |\tilde\theta|/|A\tilde s|`, :math:`\rho_1^2 = |\nu B|/|\nu|` (1 where either norm is 0).
    """
    generator = torch.Generator().manual_seed(estimator.seed)
    run = states(problem, horizon)
    s = torch.zeros_like(vector(run[0]))
    theta = torch.zeros_like(vector(problem.lam))
    sketches = [(s, theta)] * estimator.sketches

    for A, B in along(problem, run, horizon):
        for k, (s, theta) in enumerate(sketches):
            nu = noise(run[0], "sign", generator)
            carried = A @ s
            added = nu @ B
            rho_0 = _ratio(theta, carried)
            rho_1 = _ratio(added, nu)

            s = rho_0 * carried + rho_1 * nu
            theta = theta / rho_0 + added / rho_1
            sketches[k] = (s, theta)

    estimates = [(alpha @ s) * theta for s, theta in sketches]
    return torch.stack(estimates).mean(0)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    defined = bool(above.any()) and bool(below.any())
    if not defined:
        return torch.ones((), dtype=above.dtype)
    squared = above.norm() / below.norm()
    return squared.sqrt()


# -- parts ---------------------------------------------------------------------------------------
def noise(like: Tree, law: str, generator: torch.Generator, copies: int | None = None) -> Tensor:
    """Noise like a pytree, flattened (``[copies, n]`` where there are copies)."""
    drawn = []
    batch = () if copies is None else (copies,)
    for leaf in tree.floats(like):
        shape = (*batch, *leaf.shape)
        if law == "sign":
            bits = torch.randint(0, 2, shape, generator=generator)
            leaf_noise = 2.0 * bits - 1
        else:
            leaf_noise = torch.randn(shape, generator=generator, dtype=leaf.dtype)

        leaf_noise = leaf_noise.to(leaf.dtype)
        flat = leaf_noise.reshape(*batch, -1)
        drawn.append(flat)
    return torch.cat(drawn, -1)


def _inner_loss(problem: Case, w: Tree, horizon: int) -> tuple[Tensor, Tensor]:
    """The inner loss at ``w`` on the last batch, and its gradient over flattened λ."""
    assert isinstance(problem.step, InnerStep)
    batch = problem.batches[horizon - 1]
    with torch.enable_grad():
        lam = tree.attach(problem.lam)
        loss = problem.step.inner_loss(tree.detach(w), lam, batch)
        gradients = torch.autograd.grad(loss, tree.floats(lam))
    slope = vector(list(gradients))
    return loss.detach(), slope
