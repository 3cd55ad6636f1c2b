"""The last state only, and the bits needed to run the training backwards."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from metaopt import replay, tree
from metaopt.inner.contract import Step
from metaopt.inner.state import InnerState
from metaopt.inner.step import inner_of
from metaopt.optim.optimizer import per_leaf
from metaopt.optim.sgd import SGD
from metaopt.trajectory._fixed_point import Remainders, ratio, to_fixed, to_float
from metaopt.trajectory.base import Exogenous, Moment, Trajectory, check_during, check_fixed, check_since
from metaopt.tree import Tree


@dataclass
class ReversibleTape:
    """The run's newest state as integers, and what multiplying by the momentum destroyed, one entry per weight tensor.

    Attributes:
        lam: as it was at the start (to notice if it moves).
        versions: of λ, then.
        newest: the state as floats, as the run sees it.
        x: weights.
        v: velocities.
        lost: the bits.
        given: per step, what it took from outside.
        losses: per step, its inner loss.
    """

    lam: Tree
    versions: tuple[int, ...]
    newest: InnerState
    x: list[Tensor]
    v: list[Tensor]
    lost: list[Remainders]
    given: list[Exogenous] = field(default_factory=list)
    losses: list[Tensor | None] = field(default_factory=list)

    def bits_per_weight(self) -> float:
        """Size of the bits kept, per weight."""
        count = sum(x.numel() for x in self.x)
        return sum(lost.bits() * x.numel() for lost, x in zip(self.lost, self.x, strict=True)) / count


@dataclass(frozen=True)
class Reversible(Trajectory):
    r"""Momentum SGD in fixed-point numbers, run backwards in the sweep; the reversal is exact to the bit.

    .. math:: x_{t-1} = x_t + \text{round}(\eta v_t), \qquad v_{t-1} = \frac{v_t - g_t}{\mu}

    Maclaurin, Duvenaud and Adams 2015, "Gradient-based hyperparameter optimization through
    reversible learning", `arXiv 1502.03492 <https://arxiv.org/abs/1502.03492>`__.

    The moments are those of the run, and the run itself is done in fixed point: in units of 2^-52,
    with the momentum as a fraction whose denominator is at most 2^16. The start is rounded too. So
    the numbers are not those of :class:`Full` to the bit.

    Cost: two gradients per step in the sweep. Memory: one state and ``T · log2(1/momentum)`` bits
    per weight (30 at T = 200 for 0.9; a state of floats per step would take 64).

    It is for SGD with momentum, as :class:`metaopt.optim.SGD` does it, without Nesterov. Weight
    decay, dampening, schedules and learned learning rates are fine.

    Raises:
        TypeError: for any other step.
        ValueError: if the momentum is not in (0, 1].
        RuntimeError: if the run is continued from a state that is not its own.
        OverflowError: if a weight or velocity reaches 512.

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 0.5 * ((w - lam) ** 2).sum(), mo.optim.SGD(lr=0.5, momentum=0.5))
    >>> problem = mo.Problem(step, lambda w, lam, _: w.sum(), torch.zeros(1), torch.ones(1), [None] * 2)
    >>> problem.hypergradient(mo.RMD(mo.trajectory.Reversible())).total  # exact, since w_2 = λ
    tensor([1.])
    """

    exact: ClassVar[bool] = True
    bounded: ClassVar[bool] = False

    @override
    def start(self, state: InnerState, lam: Tree) -> ReversibleTape:
        x = [to_fixed(leaf, "a weight") for leaf in tree.leaves(state.w)]
        if not isinstance(state.slots, dict) or not {"momentum"} <= set(state.slots) <= {"momentum", "missed"}:
            raise TypeError("a reversible trajectory needs momentum SGD: mo.optim.SGD(lr=..., momentum=...)")
        v = [to_fixed(leaf, "a velocity") for leaf in tree.leaves(state.slots["momentum"])]
        return ReversibleTape(
            lam, replay.versions_of(lam), state, x, v, [Remainders(torch.zeros_like(leaf)) for leaf in x]
        )

    @override
    def record(
        self, tape: ReversibleTape, step: Step, state: InnerState, lam: Tree, batch: Any
    ) -> tuple[InnerState, ReversibleTape]:
        check_fixed(lam, tape.lam, tape.versions, "a reversible trajectory")
        optimizer = _momentum_sgd(step)
        if state is not tape.newest:
            raise RuntimeError(
                "a reversible trajectory was given a state that is not the one it returned last: its run is in fixed "
                "point"
            )
        given = Exogenous.now(state, batch)
        tape.given.append(given)
        rates, ratios = _settings(optimizer, state, lam)
        gradients, loss = _push(step, _floats(tape.x, tape.v, state, state.t), lam, batch)
        tape.losses.append(loss)
        check_during(state.t + 1, batch, given.versions)
        for i, g in enumerate(gradients):
            tape.v[i] = tape.lost[i].multiply(tape.v[i], *ratios[i]) + g
            tape.x[i] = tape.x[i] - _moved(rates[i], tape.v[i])
        tape.newest = _floats(tape.x, tape.v, state, state.t + 1)
        if not all(bool((leaf.abs() < 512).all()) for leaf in tree.floats(tape.newest)):
            raise OverflowError(
                "reversible learning: a weight or velocity reached 512, the end of fixed-point numbers; lower the "
                "learning rate"
            )
        return tape.newest, tape

    @override
    def moments(self, tape: ReversibleTape, step: Step, last: InnerState) -> Iterator[Moment]:
        check_fixed(tape.lam, tape.lam, tape.versions, "a reversible trajectory")
        optimizer = _momentum_sgd(step)
        x = list(tape.x)
        v = list(tape.v)
        lost = deepcopy(tape.lost)
        state = tape.newest
        for given, loss in zip(reversed(tape.given), reversed(tape.losses), strict=True):
            before = state._replace(t=state.t - 1)
            rates, ratios = _settings(optimizer, before, tape.lam)
            x = [leaf + _moved(rate, u) for leaf, rate, u in zip(x, rates, v, strict=True)]
            check_since(state.t, given.batch, given.versions)
            replay.restore(given.rng)
            gradients, _ = _push(step, _floats(x, v, state, before.t), tape.lam, given.batch)
            v = [bits.divide(u - g, *beta) for bits, u, g, beta in zip(lost, v, gradients, ratios, strict=True)]
            state = _floats(x, v, state, before.t)
            yield given.moment(state, tape.lam, loss)

    @override
    def complete(self, tape: ReversibleTape) -> bool:
        return True


def _momentum_sgd(step: Step) -> SGD:
    optimizer = inner_of(step, "a reversible trajectory").optimizer
    if not isinstance(optimizer, SGD) or optimizer.nesterov:
        raise TypeError(
            "a reversible trajectory needs momentum SGD without Nesterov, mo.optim.SGD(lr=..., momentum=...); got "
            f"{optimizer!r}"
        )
    return optimizer


def _settings(optimizer: SGD, state: InnerState, lam: Tree) -> tuple[list[Any], list[tuple[int, int]]]:
    """Learning rates, and the momenta as fractions, per weight tensor."""
    spec = tree.flatten(state.w)[1]
    t = state.t + 1
    with torch.no_grad():
        rates = per_leaf(optimizer.lr, lam, t, spec, "lr")
        momenta = per_leaf(optimizer.momentum, lam, t, spec, "momentum")
    return rates, [ratio(float(momentum)) for momentum in momenta]


def _push(step: Step, state: InnerState, lam: Tree, batch: Any) -> tuple[list[Tensor], Tensor | None]:
    """What the step adds to the decayed velocity, which is the velocity it leads to from rest.

    And the inner loss.
    """
    at_rest = state._replace(slots=tree.zeros_like(state.slots))
    new, loss = step.evaluate(at_rest, lam, batch)
    pairs = zip(tree.names(state.w), tree.leaves(at_rest.w), tree.leaves(new.w), strict=True)
    still = [name for name, old, after in pairs if after is old]
    if still:
        raise ValueError(
            f"a reversible trajectory needs a gradient for every weight, and {', '.join(still)} got none at step "
            f"{state.t + 1}: take them out of w (mo.partition)"
        )
    return [to_fixed(g, "a gradient") for g in tree.leaves(new.slots["momentum"])], loss


def _moved(rate: Any, v: Tensor) -> Tensor:
    return (rate * v.double()).round().long()


def _floats(x: list[Tensor], v: list[Tensor], like: InnerState, t: int) -> InnerState:
    flat, spec = tree.flatten(like.w)

    def floats(numbers: list[Tensor]) -> Tree:
        return tree.unflatten([to_float(fixed, leaf.dtype) for fixed, leaf in zip(numbers, flat, strict=True)], spec)

    return InnerState(floats(x), {"momentum": floats(v)}, t)
