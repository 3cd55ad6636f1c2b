"""DrMAD's trajectory: both ends, and a straight line between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from metaopt import replay, tree
from metaopt.inner.contract import Step
from metaopt.inner.state import InnerState
from metaopt.trajectory.base import Exogenous, Moment, Trajectory, check_during, check_fixed
from metaopt.tree import Tree


class InterpolatedTape(NamedTuple):
    """The first state, λ, and what each step took from outside, in order."""

    first: InnerState
    lam: Tree
    versions: tuple[int, ...]
    given: list[Exogenous]


@dataclass(frozen=True)
class Interpolated(Trajectory):
    r"""Both ends of the run; the states between them, slots included, are read off a straight line.

    .. math:: \hat s_{t-1} = \left(1 - \tfrac{t-1}{T}\right) s_0 + \tfrac{t-1}{T}\, s_T

    Fu et al. 2016, `arXiv 1601.00917 <https://arxiv.org/abs/1601.00917>`__; algorithm 2 of the
    HyperDistill paper.

    Batches and random draws are those of the run, in the same order.

    Cost: one gradient per step in the sweep. Memory: ``2 |s|``. Bias: exact only where A and B do
    not depend on the state.

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 0.5 * ((w - lam) ** 2).sum(), mo.optim.SGD(lr=0.5))
    >>> problem = mo.Problem(step, lambda w, lam, _: w.sum(), torch.zeros(1), torch.ones(1), [None] * 2)
    >>> problem.hypergradient(mo.RMD(mo.trajectory.Interpolated())).total  # A and B do not depend on the state: exact
    tensor([0.7500])
    """

    exact: ClassVar[bool] = False
    bounded: ClassVar[bool] = False

    @override
    def start(self, state: InnerState, lam: Tree) -> InterpolatedTape:
        return InterpolatedTape(state, lam, replay.versions_of(lam), [])

    @override
    def record(
        self, tape: InterpolatedTape, step: Step, state: InnerState, lam: Tree, batch: Any
    ) -> tuple[InnerState, InterpolatedTape]:
        check_fixed(lam, tape.lam, tape.versions, "an interpolated trajectory (DrMAD)")
        given = Exogenous.now(state, batch)
        tape.given.append(given)
        new = step(state, lam, batch)
        check_during(new.t, batch, given.versions)
        return new, tape

    @override
    def moments(self, tape: InterpolatedTape, step: Step, last: InnerState) -> Iterator[Moment]:
        states = straight_line(tape.first, last, len(tape.given))
        for state, given in zip(states, reversed(tape.given), strict=True):
            yield given.moment(state, tape.lam)

    @override
    def complete(self, tape: InterpolatedTape) -> bool:
        return False  # the sweep ends at s_0, but what it carries is not the cotangent of s_0


def straight_line(first: InnerState, last: InnerState, horizon: int) -> Iterator[InnerState]:
    r"""The states :math:`\hat s_{T-1}, \dots, \hat s_0` from which the steps start, newest first."""
    flat, spec = tree.flatten((last.w, last.slots))
    places = [i for i, x in enumerate(flat) if tree.is_float(x)]
    backwards = range(horizon - 1, -1, -1)
    for t, between in zip(backwards, _between(tree.floats(first), tree.floats(last), horizon), strict=True):
        for i, x in zip(places, between, strict=True):
            flat[i] = x
        w, slots = tree.unflatten(flat, spec)
        yield InnerState(w, slots, first.t + t)


def _between(first: list[Tensor], last: list[Tensor], horizon: int) -> Iterator[Sequence[Tensor]]:
    """The leaves of the states."""
    for t in range(horizon - 1, -1, -1):
        yield torch._foreach_lerp(first, last, t / horizon)  # pyright: ignore[reportPrivateImportUsage]
