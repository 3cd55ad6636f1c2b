r"""Evolution strategies over unrolled loops: the hypergradient from values of the outer loss alone.

N antithetic pairs of runs see :math:`\lambda \pm \sigma\varepsilon`; with :math:`\xi` what the
noise of a run has added up to,

.. math::
    \frac{dL_{val}}{d\lambda} \approx
    \frac1N \sum_{k=1}^N \xi_k \, \frac{L_{val}(w_k^+) - L_{val}(w_k^-)}{2\sigma}

One sweep, four noise schedules: :class:`AntitheticES` (one ε for the whole run, offline),
:class:`NRES` (the same, online: runs go on while λ moves; Li et al. 2023, `arXiv 2304.12180
<https://arxiv.org/abs/2304.12180>`__), :class:`TruncatedES` (runs restart from the nominal one,
with new noise, every window: biased), :class:`PES` (new noise every window, runs go on, ξ sums the
noise: unbiased; Vicol et al. 2021, `arXiv 2112.13835 <https://arxiv.org/abs/2112.13835>`__).
Nothing is differentiated, so the inner step and the outer loss may be chaotic, stochastic or not
differentiable at all.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from metaopt import checks, replay, tree
from metaopt.estimators import _noise
from metaopt.estimators.base import Estimator, Pullback, Response, Terms, Traits
from metaopt.estimators.hypergradient import ZeroHypergradientWarning
from metaopt.estimators.outer import OuterObjective
from metaopt.inner.contract import Step
from metaopt.inner.state import InnerState
from metaopt.trajectory.base import check_fixed
from metaopt.tree import Tree


class Pair(NamedTuple):
    """Two mirrored runs: their states, the noise ε they see now, and the noise ξ their difference is weighed with."""

    plus: InnerState
    minus: InnerState
    epsilon: Tree
    xi: Tree


class EvolutionCarry(NamedTuple):
    """The pairs, steps taken, the noise generator's state, and λ as it was at the start."""

    pairs: list[Pair]
    t: int
    generator: Tensor
    lam: Tree
    versions: tuple[int, ...]


@dataclass(frozen=True)
class Evolution(Estimator):
    """Mirrored runs under a noise schedule; see the module. The nominal run is one more, with λ itself.

    :meth:`differentiate` works from values of the outer loss: its whole derivative, direct part
    included, is reported as the indirect term. :meth:`respond` gives the same runs as a pullback
    that is linear in α: ``mean ξ α·(w⁺ - w⁻)/2σ``.

    Cost: ``2 · pairs`` more steps per inner step, ``2 · pairs`` outer losses per hyper-step, no
    derivative. Memory: ``2 · pairs`` states.

    Args:
        pairs: N ≥ 1.
        sigma: σ; the derivative is that of the outer loss smoothed over this scale.
        seed: of the noise.

    Raises:
        ValueError: for bad settings.

    Warns:
        ZeroHypergradientWarning: if the mirrored runs have equal outer losses, in every pair.
    """

    pairs: int = 1
    sigma: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        checks.count(self, "pairs", self.pairs)
        checks.positive(self, "sigma", self.sigma)

    @abstractmethod
    def _renewed(self, pair: Pair, state: InnerState, noise: Tree, t: int) -> Pair:
        """The pair as it enters step ``t + 1``, given fresh noise that it may take up or not."""

    def init(self, step: Step, state: InnerState, lam: Tree) -> EvolutionCarry:
        """All runs at the initial state, without noise yet."""
        zero = tree.zeros_like(lam)
        return EvolutionCarry(
            [Pair(state, state, zero, zero)] * self.pairs, 0, _noise.start(self.seed), lam, replay.versions_of(lam)
        )

    def advance(
        self, step: Step, state: InnerState, lam: Tree, batch: Any, carry: EvolutionCarry
    ) -> tuple[InnerState, EvolutionCarry]:
        """A step of every run, all with the same batch and the same random draws."""
        if not self.online:
            check_fixed(lam, carry.lam, carry.versions, type(self).__name__)
        if carry.t == 0:
            _noise.check_precision(lam, self.sigma, f"{type(self).__name__}: sigma", "hyperparameters")
        rng = replay.snapshot(state)
        new = step(state, lam, batch)
        pairs: list[Pair] = []
        generator = carry.generator
        with replay.preserved(state):
            for pair in carry.pairs:
                noise, generator = _noise.draw(lam, "gaussian", generator)
                pair = self._renewed(pair, state, noise, carry.t)
                replay.restore(rng)
                plus = step(pair.plus, self._moved(lam, pair, 1), batch)
                replay.restore(rng)
                minus = step(pair.minus, self._moved(lam, pair, -1), batch)
                pairs.append(pair._replace(plus=plus, minus=minus))
        return new, carry._replace(pairs=pairs, t=carry.t + 1, generator=generator)

    def respond(self, step: Step, state: InnerState, lam: Tree, carry: EvolutionCarry) -> tuple[Tree, Pullback]:
        """The weights, and the pullback of the runs' differences."""

        def pullback(alpha: Tree) -> Response:
            tree.check_like(alpha, state.w, "alpha", "w")
            return Response(
                self._mean(carry, [tree.dot(alpha, tree.sub(pair.plus.w, pair.minus.w)) for pair in carry.pairs], lam)
            )

        return state.w, pullback

    def differentiate(
        self, step: Step, outer: OuterObjective, state: InnerState, lam: Tree, carry: EvolutionCarry
    ) -> Terms:
        """From values of the outer loss, at ``(w±, λ ± σε)``."""
        loss = outer.value(state.w, lam)
        rng = replay.snapshot(state)
        differences = []
        with replay.preserved(state):
            for pair in carry.pairs:
                replay.restore(rng)
                above = outer.value(pair.plus.w, self._moved(lam, pair, 1))
                replay.restore(rng)
                differences.append(above - outer.value(pair.minus.w, self._moved(lam, pair, -1)))
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(f"outer_loss is {loss.item()} after {state.t} inner steps ({type(self).__name__})")
        if all(bool(difference == 0) for difference in differences):
            warnings.warn(
                f"{type(self).__name__}: the outer loss is the same on both sides of every pair, so the "
                "hypergradient is zero: lam does not "
                f"influence it, or not on the scale sigma = {self.sigma}",
                ZeroHypergradientWarning,
                stacklevel=3,
            )
        return Terms(loss, tree.map(lambda _: None, lam), self._mean(carry, differences, lam))

    def _moved(self, lam: Tree, pair: Pair, sign: int) -> Tree:
        return tree.add(lam, tree.scale(sign * self.sigma, pair.epsilon))

    def _mean(self, carry: EvolutionCarry, differences: list[Tensor], lam: Tree) -> Tree:
        total = tree.zeros_like(lam)
        for pair, difference in zip(carry.pairs, differences, strict=True):
            total = tree.add(total, tree.scale(difference / (2 * self.sigma * self.pairs), pair.xi))
        return total


@dataclass(frozen=True)
class NRES(Evolution):
    """Noise-reuse: each pair keeps its ε for the whole run, while λ may move.

    Bias: none but the smoothing for fixed λ, and less variance than :class:`PES` where the losses
    of different windows agree; offline it is :class:`AntitheticES`.
    """

    traits: ClassVar[Traits] = Traits(
        sees="the whole run", high_dimensional=False, bias="smoothing (λ fixed); noise grows with the size of λ"
    )

    def _renewed(self, pair: Pair, state: InnerState, noise: Tree, t: int) -> Pair:
        return pair._replace(epsilon=noise, xi=noise) if t == 0 else pair


@dataclass(frozen=True)
class AntitheticES(NRES):
    """One perturbation of λ per pair for the whole run. Bias: none but the smoothing.

    Offline: moving λ is an error.
    """

    traits: ClassVar[Traits] = Traits(
        sees="the whole run", high_dimensional=False, bias="smoothing; noise grows with the size of λ"
    )
    online = False


@dataclass(frozen=True)
class Windowed(Evolution):
    """Noise that is renewed every ``window`` steps.

    Args:
        window: K ≥ 1; online, take hyper-steps at multiples of it (``HyperSteps(every=K)``) or more
            often.
    """

    window: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.count(self, "window", self.window)


@dataclass(frozen=True)
class TruncatedES(Windowed):
    """Pairs restart from the nominal run every window. Bias.

    What happened before the window is dropped (short-horizon bias).
    """

    traits: ClassVar[Traits] = Traits(
        sees="the last K steps", high_dimensional=False, bias="as truncated; smoothing; noise grows with the size of λ"
    )

    def _renewed(self, pair: Pair, state: InnerState, noise: Tree, t: int) -> Pair:
        return Pair(state, state, noise, noise) if t % self.window == 0 else pair


@dataclass(frozen=True)
class PES(Windowed):
    """Persistent evolution strategies: pairs never restart, and ξ sums the noise of all windows.

    Bias: none but the smoothing (for a λ that moves slowly); the variance grows with the number of
    windows, and there is least where one window is the whole run (:class:`AntitheticES`).
    """

    traits: ClassVar[Traits] = Traits(
        sees="the whole run", high_dimensional=False, bias="smoothing; noise grows with the sizes of λ and T"
    )

    def _renewed(self, pair: Pair, state: InnerState, noise: Tree, t: int) -> Pair:
        return pair._replace(epsilon=noise, xi=tree.add(pair.xi, noise)) if t % self.window == 0 else pair
