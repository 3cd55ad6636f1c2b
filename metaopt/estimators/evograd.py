"""EvoGrad: the inner update replaced by one generation of an evolution strategy."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from metaopt import checks, replay, tree
from metaopt.estimators import _noise
from metaopt.estimators.base import Estimator, Pullback, Response, Traits
from metaopt.estimators.hypergradient import ZeroHypergradientWarning
from metaopt.inner.contract import Step
from metaopt.inner.state import InnerState
from metaopt.replay import Rng
from metaopt.tree import Tree


class EvoGradCarry(NamedTuple):
    """The weights to perturb, their batch, the random state before that step, and the states of the noise."""

    w: Tree
    batch: Any
    rng: Rng | None
    generator: Tensor
    next_generator: Tensor


@dataclass(frozen=True)
class EvoGrad(Estimator):
    r"""First-order hypergradients from a population of K perturbed copies of the weights.

    .. math::
        \theta_k = w + \varepsilon_k, \quad \ell_k = L(\theta_k, \lambda; D), \quad
        \theta^* = \sum_k \mathrm{softmax}(-\ell/\tau)_k\, \theta_k, \qquad
        \frac{dL_{val}(\theta^*)}{d\lambda} =
        \alpha \cdot E \cdot \frac{\partial\, \mathrm{softmax}(-\ell/\tau)}{\partial \lambda}

    with :math:`E` the matrix of the :math:`\varepsilon_k` and α taken at θ*. No second derivative
    of the loss is needed. Bohdal et al. 2021, `arXiv 2106.10575
    <https://arxiv.org/abs/2106.10575>`__.

    The outer loss is taken at θ*; the run itself goes on with ordinary inner steps. Cost per
    hyper-step: K losses and one gradient of them with respect to λ. Memory: K copies of the
    perturbed weights and one graph of K losses. Bias: horizon 1, and another size: for small σ the
    mean is :math:`\eta_{\mathrm{eff}} = \frac{K-1}{K} \frac{\sigma^2}{\tau}` times :math:`-\alpha\,
    \partial^2 L/\partial w \partial\lambda` (the 1-step hypergradient at learning rate 1). Either
    use a scale-free outer optimiser (Adam), or ``unit_rate``.

    In a stacked meta-batch the softmax sees the sum of the tasks' losses: the mean for small σ is
    the sum over tasks, the noise is larger.

    Args:
        copies: K ≥ 2.
        sigma: size of the perturbation.
        temperature: τ.
        noise: ``"sign"``, ±σ per coordinate, or ``"gaussian"``.
        around: perturb the weights ``"before"`` the last inner step or ``"after"`` it (the paper's
            cross-domain experiments).
        perturb: glob patterns of the weights to perturb, e.g. ``["head.*"]``; default: all of them.
        unit_rate: divide the pullback by :math:`\eta_{\mathrm{eff}}`.
        copies_at_once: copies evaluated at a time under ``vmap``; ``None``: all; 1: one after another
            without ``vmap`` (what ``vmap`` cannot do, such as batch norm that updates running
            statistics).
        seed: of the perturbations.
        check_size: warn (:class:`~metaopt.meta.SizeWarning`) where an online loop hands such a
            hypergradient to plain gradient descent.

    Raises:
        ValueError: for bad settings, or patterns that match no weight.

    Warns:
        ZeroHypergradientWarning: if all copies came out identical, so that the pullback is zero
            whatever λ does.

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 0.5 * ((w - lam) ** 2).sum(), mo.optim.SGD(lr=0.5))
    >>> problem = mo.Problem(step, lambda w, lam, _: w.sum(), torch.zeros(1), torch.ones(1), [None] * 2)
    >>> problem.hypergradient(mo.EvoGrad(sigma=0.001, temperature=0.05)).total  # one gradient step of rate σ²/τ
    tensor([1.9998e-05])
    """

    traits: ClassVar[Traits] = Traits(
        sees="the last step", high_dimensional=True, bias="as 1-step, smoothed; another size; noise"
    )

    sees_optimizer = False

    copies: int = 2
    sigma: float = 1e-3
    temperature: float = 0.05
    noise: _noise.Law = "sign"
    around: Literal["before", "after"] = "before"
    perturb: Sequence[str] | None = None
    unit_rate: bool = False
    copies_at_once: int | None = None
    seed: int = 0
    check_size: bool = True

    def __post_init__(self) -> None:
        checks.count(self, "copies", self.copies, at_least=2)
        checks.positive(self, "sigma", self.sigma)
        checks.positive(self, "temperature", self.temperature)
        checks.one_of(self, "noise", self.noise, ("gaussian", "sign"))
        checks.one_of(self, "around", self.around, ("before", "after"))
        if self.copies_at_once is not None:
            checks.count(self, "copies_at_once", self.copies_at_once)

    @property
    def own_size(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Yes, without ``unit_rate``; no where that is said to be meant."""
        return self.check_size and not self.unit_rate

    @property
    def effective_rate(self) -> float:
        r"""The rate that the copies stand for, :math:`\eta_{\mathrm{eff}} = \frac{K-1}{K} \frac{\sigma^2}{\tau}`."""
        return (self.copies - 1) / self.copies * self.sigma**2 / self.temperature

    def init(self, step: Step, state: InnerState, lam: Tree) -> EvoGradCarry:
        """Nothing seen yet; the generator of the seed."""
        generator = _noise.start(self.seed)
        return EvoGradCarry(state.w, None, None, generator, generator)

    def advance(
        self, step: Step, state: InnerState, lam: Tree, batch: Any, carry: EvoGradCarry
    ) -> tuple[InnerState, EvoGradCarry]:
        """A plain step; where it happened is kept, and the generator moves on."""
        rng = replay.snapshot(state)
        new = step(state, lam, batch)
        _, following = _noise.draw(state.w, self.noise, carry.next_generator, copies=self.copies)
        return new, EvoGradCarry(
            state.w if self.around == "before" else new.w, batch, rng, carry.next_generator, following
        )

    def respond(self, step: Step, state: InnerState, lam: Tree, carry: EvoGradCarry) -> tuple[Tree, Pullback]:
        """``θ*``, and the pullback through the softmax."""
        _noise.check_precision(carry.w, self.sigma, "EvoGrad: sigma", "weights")
        epsilon = self.perturbations(carry)
        with torch.enable_grad():
            lam_ = tree.attach(lam)
            losses = self._losses(step, tree.map(lambda w, e: w + e, tree.detach(carry.w), epsilon), lam_, carry)
            weights = torch.softmax(-losses / self.temperature, 0)
        point = tree.map(lambda w, e: w + torch.tensordot(weights.detach().to(e.dtype), e, 1), carry.w, epsilon)
        size = 1.0 / self.effective_rate if self.unit_rate else 1.0

        def pullback(alpha: Tree) -> Response:
            tree.check_like(alpha, state.w, "alpha", "w")
            if not weights.requires_grad:
                return Response(tree.map(lambda _: None, lam))
            seeds = [
                (a * e).reshape(self.copies, -1).sum(1)
                for a, e in zip(tree.leaves(alpha), tree.leaves(epsilon), strict=True)
            ]
            flat, spec = tree.flatten(lam_)
            seed = size * torch.stack(seeds).sum(0).to(weights.dtype)
            return Response(
                tree.unflatten(torch.autograd.grad(weights, flat, seed, retain_graph=True, allow_unused=True), spec)
            )

        return point, pullback

    def perturbations(self, carry: EvoGradCarry) -> Tree:
        """``ε_k`` of the last step, ``[K, *leaf.shape]``; zero on weights that are not perturbed."""
        if carry.rng is None:
            raise ValueError("EvoGrad has seen no inner step yet: it needs the batch of one")
        noise, _ = _noise.draw(carry.w, self.noise, carry.generator, copies=self.copies)
        names = tree.dotted_names(carry.w)
        chosen = names if self.perturb is None else tree.matching(names, self.perturb, "weight to perturb")
        flat, spec = tree.flatten(noise)
        pairs = zip(flat, names, strict=True)
        epsilon = [self.sigma * e if name in chosen else torch.zeros_like(e) for e, name in pairs]
        if all(bool((e == e[:1]).all()) for e in epsilon):
            warnings.warn(
                f"EvoGrad: all {self.copies} perturbed copies of the weights are identical, so this hypergradient is "
                "zero whatever lam does. "
                "Use noise='gaussian', more copies, or perturb more weights",
                ZeroHypergradientWarning,
                stacklevel=3,
            )
        return tree.unflatten(epsilon, spec)

    def _losses(self, step: Step, population: Tree, lam: Tree, carry: EvoGradCarry) -> Tensor:
        assert carry.rng is not None  # perturbations() has checked it
        with replay.preserved(carry.w):
            replay.restore(carry.rng)
            if self.copies_at_once == 1:
                return torch.stack(
                    [step.loss(tree.select(population, k), lam, carry.batch) for k in range(self.copies)]
                )
            mapped = torch.vmap(
                lambda w: step.loss(w, lam, carry.batch), chunk_size=self.copies_at_once, randomness="different"
            )
            return mapped(population)
