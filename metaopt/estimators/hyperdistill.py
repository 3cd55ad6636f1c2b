"""HyperDistill: the whole indirect term distilled into one product."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self, override

from metaopt import checks, replay, tree
from metaopt.estimators.base import Estimator, FinishedRun, Pullback, Response, Traits
from metaopt.estimators.reverse import sweep
from metaopt.inner.contract import Step
from metaopt.inner.state import InnerState
from metaopt.replay import Rng
from metaopt.trajectory import Distillate, Distilled, Moment
from metaopt.trajectory.distilled import geometric_sum
from metaopt.trajectory.interpolated import straight_line
from metaopt.tree import Tree


class HyperDistillCarry(NamedTuple):
    """The distillates so far, and the random state before the last step."""

    distillate: Distillate | None = None
    rng: Rng | None = None


class SizeSamples(NamedTuple):
    """What algorithm 4 collects: ``y_s ≈ θ x_s`` for horizons s = 1 … T (figure 4 of the paper)."""

    x: Tensor
    y: Tensor

    @property
    def theta(self) -> float:
        """Least squares through the origin, ``(x·y)/(x·x)``; NaN where every ``x`` is zero."""
        return float(self.x.dot(self.y) / self.x.dot(self.x))


@dataclass(frozen=True)
class HyperDistill(Estimator):
    r"""Online hypergradients over the whole horizon from one product at a distilled point.

    .. math::
        g^{SO}_t \approx \theta\, S_t\, v_t, \qquad v_t = \alpha_t \frac{\partial \Phi(w^*_t,
        \lambda; D^*_t)}{\partial \lambda}, \qquad S_t = \sum_{i \le t} \gamma^{t-i}

    Lee et al. 2022, "Online hyperparameter meta-learning with hypergradient distillation", ICLR,
    `arXiv 2110.02508 <https://arxiv.org/abs/2110.02508>`__: algorithms 3 and 4, equations 13-18.
    The norms in :math:`\pi_t f_t` cancel (eq. 15), so the pullback is linear in α.

    Cost per hyper-step: one gradient at ``w*`` with its graph, one product; a calibration takes
    ``3T - 1`` products. Memory: one more state and batch. Bias: the direction is that of ``Σ
    γ^{t-i} α_t B_i`` up to the distillation; the size is as good as θ. Exact for isotropic
    quadratics with ``γ`` the contraction factor.

    Args:
        gamma: decay γ in [0, 1]; 0 is the 1-step method up to θ.
        theta: size θ; :meth:`calibrate` fits it.
        pi: what multiplies the direction: ``"theta"`` the fitted size ``θ S_t v_t``; ``"plain"`` v
            itself (the paper's π = 1 as its appendix I needs it); ``"unit"`` π = 1 read literally,
            ``v/‖v‖`` (not linear in α: :func:`metaopt.unroll` refuses it).
        example_axis: axis of the batch tensors that runs over examples; ``None``: 1 where the step
            is one of stacked tasks, else 0.
        stochastic_rounding: see :class:`metaopt.trajectory.Distilled`.
        seed: of the subsampling of ``D*``.

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 0.5 * ((w - lam) ** 2).sum(), mo.optim.SGD(lr=0.5))
    >>> problem = mo.Problem(step, lambda w, lam, _: w.sum(), torch.zeros(1), torch.ones(1), [None] * 2)
    >>> problem.hypergradient(mo.HyperDistill(gamma=0.5)).total  # γ is the contraction of this step, so it is exact
    tensor([0.7500])
    """

    traits: ClassVar[Traits] = Traits(
        sees="the whole run", high_dimensional=True, bias="direction distilled into one point, size fitted"
    )

    gamma: float = 0.99
    theta: float = 1.0
    pi: Literal["theta", "plain", "unit"] = "theta"
    example_axis: int | None = None
    stochastic_rounding: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        checks.unit_interval(self, "gamma", self.gamma)
        checks.finite(self, "theta", self.theta)
        checks.one_of(self, "pi", self.pi, ("theta", "plain", "unit"))
        if self.example_axis is not None:
            checks.count(self, "example_axis", self.example_axis, at_least=0)
        checks.count(self, "seed", self.seed, at_least=0)

    @property
    def needs_calibration(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Where θ counts, as long as it is 1."""
        return self.pi == "theta" and self.theta == 1.0

    @property
    @override
    def linear(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.pi != "unit"

    def memory(self, step: Step) -> Distilled:
        """What is remembered of the run: a running mean of the weights and of the batches."""
        axis = int(step.stacked) if self.example_axis is None else self.example_axis
        return Distilled(self.gamma, axis, self.stochastic_rounding, self.seed)

    @override
    def init(self, step: Step, state: InnerState, lam: Tree) -> HyperDistillCarry:
        return HyperDistillCarry()

    def advance(
        self, step: Step, state: InnerState, lam: Tree, batch: Any, carry: HyperDistillCarry
    ) -> tuple[InnerState, HyperDistillCarry]:
        """Algorithm 3, lines 9 and 11: distil, then step."""
        old = carry.distillate
        memory = self.memory(step)
        distillate = memory.start(state, batch) if old is None else memory.append(old, state, batch)
        rng = replay.snapshot(state)
        return step(state, lam, batch), HyperDistillCarry(distillate, rng)

    def respond(self, step: Step, state: InnerState, lam: Tree, carry: HyperDistillCarry) -> tuple[Tree, Pullback]:
        """Algorithm 3, line 12: one product at ``(w*_t, λ; D*_t)``."""
        distillate, rng = carry
        if distillate is None or rng is None:
            raise ValueError("HyperDistill has seen no inner step yet")

        def pullback(alpha: Tree) -> Response:
            tree.check_like(alpha, state.w, "alpha", "w")
            with replay.preserved(state):
                moment = Moment(distillate.state, lam, distillate.batch, rng)
                _, v = moment.pullback(step, InnerState(alpha, None, state.t), "lam")
            return Response(tree.scale(self._size(v, distillate.t), v))

        return state.w, pullback

    def _size(self, v: Tree, t: int) -> float | Tensor:
        if self.pi == "plain":
            return 1.0
        if self.pi == "unit":
            size = tree.norm(v)
            return torch.where(size > 0, 1.0 / size, torch.ones_like(size))
        return self.theta * geometric_sum(self.gamma, t)

    def calibrate(self, step: Step, lam: Tree, run: FinishedRun) -> Self:
        """Algorithm 4: θ fitted along one finished run. A negative θ is kept as it is.

        Warns:
            UserWarning: if every ``v_s`` is zero; θ is then undefined and set to 1.
        """
        if self.pi != "theta":
            return self
        theta = self.size_samples(step, lam, run).theta
        if theta != theta:
            warnings.warn(
                "HyperDistill: every v_s is zero, so theta is undefined; using theta = 1", UserWarning, stacklevel=2
            )
            theta = 1.0
        return replace(self, theta=theta)

    def size_samples(self, step: Step, lam: Tree, run: FinishedRun) -> SizeSamples:
        """``(x_s, y_s)`` of algorithm 4.

        DrMAD's partial sweeps against the product at the distillate of the same horizon.
        """
        horizon = len(run.batches)
        memory = self.memory(step)
        rng = replay.snapshot(run.first)
        states = straight_line(run.first, run.last, horizon)
        moments = [Moment(state, lam, batch, rng) for state, batch in zip(states, reversed(run.batches), strict=True)]
        alpha = InnerState(run.alpha, None, run.last.t)
        partial_sums = sweep(step, iter(moments), alpha, lam, to_start=False)
        xs = []
        ys = []
        distillate = None
        with replay.preserved(run.first):
            for moment, (g, _) in zip(moments, partial_sums, strict=True):
                old = distillate
                distillate = (
                    memory.start(moment.state, moment.batch)
                    if old is None
                    else memory.prepend(old, moment.state, moment.batch)
                )
                _, v = Moment(distillate.state, lam, distillate.batch, rng).pullback(step, alpha, "lam")
                size = tree.norm(v)
                xs.append(size * geometric_sum(self.gamma, distillate.t))
                ys.append(tree.dot(v, g) / size if bool(size > 0) else torch.zeros_like(size))
        return SizeSamples(torch.stack(xs), torch.stack(ys))
