"""Reverse mode: one sweep of products with the step's Jacobians, over whatever trajectory is remembered."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from metaopt import checks, replay, tree
from metaopt.estimators.base import Estimator, Pullback, Response, Traits
from metaopt.inner.contract import Step, Wrt
from metaopt.inner.state import InnerState
from metaopt.trajectory import Full, Interpolated, Last, Trajectory
from metaopt.trajectory._rows import Place
from metaopt.trajectory.base import Losses, Moment, check_replayed
from metaopt.tree import Tree


class ReverseMode(Estimator):
    """The sweep over a trajectory; what the trajectory is makes the method."""

    whole_state = True
    gives_initial = True

    @property
    @abstractmethod
    def remembered(self) -> Trajectory:
        """What is remembered of the run."""

    @property
    def online(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Where the trajectory is bounded."""
        return self.remembered.bounded

    @override
    def init(self, step: Step, state: InnerState, lam: Tree) -> Any:
        return self.remembered.start(state, lam)

    @override
    def advance(self, step: Step, state: InnerState, lam: Tree, batch: Any, carry: Any) -> tuple[InnerState, Any]:
        return self.remembered.record(carry, step, state, lam, batch)

    def respond(self, step: Step, state: InnerState, lam: Tree, carry: Any) -> tuple[Tree, Pullback]:
        """The weights, and the sweep."""

        def pullback(alpha: Tree) -> Response:
            cotangent = alpha if isinstance(alpha, InnerState) else InnerState(alpha, None, state.t)
            tree.check_like(cotangent.w, state.w, "alpha", "w")
            return self.pull(step, state, lam, carry, {state.t: cotangent})

        return state.w, pullback

    def pull(
        self, step: Step, state: InnerState, lam: Tree, carry: Any, cotangents: Mapping[int, InnerState]
    ) -> Response:
        """One sweep that takes in each state's cotangent on its way down."""
        complete = self.remembered.complete(carry)
        waiting = dict(cotangents)
        last = waiting.pop(state.t, None) or InnerState(tree.zeros_like(state.w), None, state.t)
        total: Tree = None
        cotangent = last
        moments = self.remembered.moments(carry, step, state)
        for total, cotangent in sweep(step, moments, last, lam, to_start=complete, waiting=waiting):  # noqa: B007
            pass
        if waiting:
            raise ValueError(
                f"{self!r} does not remember the run back to step {min(waiting)}, whose state has a cotangent: use "
                "RMD over a trajectory that keeps the whole run"
            )
        total = tree.zeros_like(lam) if total is None else tree.map(_as_dtype_of, total, lam)
        return Response(total, cotangent if complete else None)


def sweep(
    step: Step,
    moments: Iterator[Moment],
    cotangent: InnerState,
    lam: Tree,
    *,
    to_start: bool,
    waiting: dict[int, InnerState] | None = None,
) -> Iterator[tuple[Tree, InnerState]]:
    """The sweep, one ``(g, α)`` after each step, newest step first.

    Args:
        step: Φ.
        moments: the remembered steps, newest first.
        cotangent: of the last state.
        lam: a pytree like λ.
        to_start: whether the cotangent of the oldest state is wanted too; otherwise that last
            product is left out.
        waiting: cotangents of earlier states by their number ``t``; each is added when its state is
            reached, and taken out.

    ``g`` is summed in float32 at least; afterwards the inner losses of the replay are compared with
    those of the run. What was yielded is overwritten by the next steps.
    """
    total = tree.map(lambda _: None, lam)
    place = Place()
    losses: list[Losses] = []
    with replay.preserved(cotangent.w):
        for moment, wrt in _wanted(moments, to_start=to_start):
            state_bar, product = moment.pullback(step, cotangent, wrt, losses)
            total = tree.accumulate(total, product)
            cotangent = place.put(state_bar) if state_bar is not None else cotangent
            del state_bar, product
            if waiting and moment.state.t in waiting:
                cotangent = _sum(cotangent, waiting.pop(moment.state.t))
            yield total, cotangent
    check_replayed(losses)


def _wanted(moments: Iterator[Moment], *, to_start: bool) -> Iterator[tuple[Moment, Wrt]]:
    """Each moment with the products that are wanted there.

    Only where the oldest one differs is a moment asked for before the one in front of it has been
    used: a trajectory may fill one buffer with the batch of the moment at hand.
    """
    if to_start:
        for moment in moments:
            yield moment, "both"
        return
    newer = next(moments, None)
    for moment in moments:
        assert newer is not None
        yield newer, "both"
        newer = moment
    if newer is not None:
        yield newer, "lam"


def _as_dtype_of(total: Tensor | None, leaf: Any) -> Tensor | None:
    return None if total is None else total.to(leaf.dtype)


def _sum(a: InnerState, b: InnerState) -> InnerState:
    """The sum of two cotangents of one state."""
    if a.slots is None or b.slots is None:
        return a._replace(w=tree.add(a.w, b.w), slots=b.slots if a.slots is None else a.slots)
    return a._replace(w=tree.add(a.w, b.w), slots=tree.add(a.slots, b.slots))


@dataclass(frozen=True)
class RMD(ReverseMode):
    r"""Reverse-mode differentiation: the exact hypergradient.

    .. math::
        g \leftarrow g + \alpha B_t, \quad \alpha \leftarrow \alpha A_t \qquad (t = T \dots 1),
        \qquad A_t = \frac{\partial \Phi}{\partial s_{t-1}}, \; B_t = \frac{\partial \Phi}{\partial
        \lambda}

    Algorithm 1 of the HyperDistill paper; Franceschi et al. 2017, `arXiv 1703.01785
    <https://arxiv.org/abs/1703.01785>`__. Over the full trajectory that is RMD, over the last K
    states truncated RMD (Shaban et al. 2019, `arXiv 1810.10667
    <https://arxiv.org/abs/1810.10667>`__), over the last one the 1-step method (Luketina et al.
    2016, `arXiv 1511.06727 <https://arxiv.org/abs/1511.06727>`__), over a straight line DrMAD (Fu
    et al. 2016, `arXiv 1601.00917 <https://arxiv.org/abs/1601.00917>`__).

    Cost: ``2T`` products (the last gives ``initial``) and, over :class:`~metaopt.trajectory.Full`,
    ``T`` recomputed gradients. Memory: the trajectory's. Bias: exact. Offline: λ must not move.

    Args:
        trajectory: how the run is remembered; default: every state.

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 0.5 * ((w - lam) ** 2).sum(), mo.optim.SGD(lr=0.5))
    >>> problem = mo.Problem(step, lambda w, lam, _: w.sum(), torch.zeros(1), torch.ones(1), [None] * 2)
    >>> problem.hypergradient(mo.RMD()).total  # 1 - (1 - 0.5)²
    tensor([0.7500])
    """

    traits: ClassVar[Traits] = Traits(sees="the whole run", high_dimensional=True, bias="none")
    one_sweep = True

    trajectory: Trajectory = Full()

    def __post_init__(self) -> None:
        checks.provides(self, "trajectory", self.trajectory, "moments", "for instance mo.trajectory.Checkpointed(16)")

    @property
    def exact(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Where the trajectory goes back to the start, at the states of the run."""
        return self.trajectory.exact and not self.trajectory.bounded

    @property
    @override
    def remembered(self) -> Trajectory:
        return self.trajectory


@dataclass(frozen=True)
class TruncatedRMD(ReverseMode):
    """The first K terms of the sweep.

    Cost: ``2K - 1`` products and K recomputed gradients. Memory: K states. Bias: what happened more
    than K steps ago is dropped; ``steps ≥ T`` is :class:`RMD`, 1 is :class:`OneStep`, 0 is
    first-order.

    Args:
        steps: K.

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 0.5 * ((w - lam) ** 2).sum(), mo.optim.SGD(lr=0.5))
    >>> problem = mo.Problem(step, lambda w, lam, _: w.sum(), torch.zeros(1), torch.ones(1), [None] * 30)
    >>> problem.hypergradient(mo.TruncatedRMD(steps=2)).total  # the last two of thirty steps: 1 - (1 - 0.5)²
    tensor([0.7500])
    """

    traits: ClassVar[Traits] = Traits(
        sees="the last K steps", high_dimensional=True, bias="the steps before the last K"
    )

    steps: int

    def __post_init__(self) -> None:
        checks.count(self, "steps", self.steps, at_least=0)

    @property
    def drops_indirect(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """With no step it is first-order."""
        return self.steps == 0

    @property
    @override
    def remembered(self) -> Trajectory:
        return Last(self.steps)


@dataclass(frozen=True)
class OneStep(ReverseMode):
    """One-step look-ahead: ``α_t B_t``, on the training step's own graph.

    Cost: one product per hyper-step, no recomputation. Memory: one graph. Bias: the state before
    the last step is taken as constant (short-horizon bias).

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 0.5 * ((w - lam) ** 2).sum(), mo.optim.SGD(lr=0.5))
    >>> problem = mo.Problem(step, lambda w, lam, _: w.sum(), torch.zeros(1), torch.ones(1), [None] * 2)
    >>> problem.hypergradient(mo.OneStep()).total  # the last step alone: its rate
    tensor([0.5000])
    """

    traits: ClassVar[Traits] = Traits(sees="the last step", high_dimensional=True, bias="the steps before the last")

    @property
    def remembered(self) -> Trajectory:
        """The last step, with its graph."""
        return Last(1, graphs=True)


@dataclass(frozen=True)
class DrMAD(ReverseMode):
    """RMD's sweep along the straight line between the first and the last state.

    Cost: ``2T - 1`` products and T gradients. Memory: that of
    :class:`~metaopt.trajectory.Interpolated`. Bias: exact only where A and B do not depend on
    the state; there is no bound in general. Offline.

    Exact :class:`RMD` is as fast over every state (on tiny nets over every graph) and as small over
    checkpoints (measured: ``benchmarks/README.md``). What is left to DrMAD are runs whose states do
    not fit and whose steps are too dear to be run again once to three times, and published results
    that used it.

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 0.5 * ((w - lam) ** 2).sum(), mo.optim.SGD(lr=0.5))
    >>> problem = mo.Problem(step, lambda w, lam, _: w.sum(), torch.zeros(1), torch.ones(1), [None] * 2)
    >>> problem.hypergradient(mo.DrMAD()).total  # A and B do not depend on the state, so it is exact
    tensor([0.7500])
    """

    traits: ClassVar[Traits] = Traits(
        sees="the whole run", high_dimensional=True, bias="the states, taken from a straight line"
    )

    @property
    @override
    def remembered(self) -> Trajectory:
        return Interpolated()
