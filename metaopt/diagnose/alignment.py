"""How close estimators come to the exact hypergradient along one inner run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaopt import replay, tree
from metaopt.diagnose.results import Estimators, Result, named
from metaopt.estimators import RMD, Cost, Estimator, OuterObjective
from metaopt.estimators.cost import CountedStep
from metaopt.problem import Problem
from metaopt.verify.reference import vector


class Hypergradients(NamedTuple):
    """One estimator's answer after t inner steps, flattened.

    Attributes:
        t: inner steps taken.
        total: direct and indirect term together.
        indirect: the indirect term.
        cost: everything done so far in this run, earlier answers included.
    """

    t: int
    total: Tensor
    indirect: Tensor
    cost: Cost


class Closeness(NamedTuple):
    """An approximation ``g`` of ``g*``.

    Attributes:
        cosine: ``g·g* / (‖g‖ ‖g*‖)``; NaN where one of them is zero.
        norm_ratio: ``‖g‖ / ‖g*‖``.
        relative_error: ``‖g - g*‖ / ‖g*‖``.
    """

    cosine: float
    norm_ratio: float
    relative_error: float


class Point(NamedTuple):
    """One estimator after t inner steps: its hypergradient, and its indirect term alone, against the exact ones."""

    estimator: str
    t: int
    total: Closeness
    indirect: Closeness


@dataclass(frozen=True, repr=False)
class Alignment(Result):
    """What :func:`alignment` returns.

    Attributes:
        problem: its name.
        points: by estimator, then by t.
        exact_norms: t to ``(‖g*‖, ‖indirect part of g*‖)``.
    """

    problem: str
    points: tuple[Point, ...]
    exact_norms: dict[int, tuple[float, float]]

    @property
    def title(self) -> str:
        """What it is compared with."""
        return f"{self.problem}: against exact RMD"

    def curve(self, estimator: str, *, of: str = "total", value: str = "cosine") -> tuple[list[int], list[float]]:
        """``(t, values)`` of one estimator.

        Args:
            estimator: its name.
            of: ``"total"`` or ``"indirect"``.
            value: ``"cosine"``, ``"norm_ratio"`` or ``"relative_error"``.
        """
        mine = [point for point in self.points if point.estimator == estimator]
        return [point.t for point in mine], [getattr(getattr(point, of), value) for point in mine]

    def rows(self) -> list[dict[str, Any]]:
        """One line per estimator and t."""
        return [
            {
                "estimator": p.estimator,
                "t": p.t,
                **p.total._asdict(),
                **{f"indirect {key}": value for key, value in p.indirect._asdict().items()},
            }
            for p in self.points
        ]

    def draw(self, axes: Any) -> None:
        """Cosine of the hypergradient against t."""
        for estimator in dict.fromkeys(point.estimator for point in self.points):
            axes.plot(*self.curve(estimator), ".-", label=estimator)
        axes.set(xlabel="inner steps t", ylabel="cosine to the exact hypergradient")
        axes.legend(fontsize="small")


def alignment(
    estimators: Estimators,
    problem: Problem,
    at: Sequence[int] | None = None,
    *,
    exact: Estimator = RMD(),
    shared_run: bool = True,
) -> Alignment:
    r"""Cosine, norm ratio and relative error to the exact hypergradient, at several t.

    .. math:: g_t = \partial_\lambda L_{val} + \alpha_t\, \widehat{dw_t/d\lambda}

    λ stays where ``problem.lam`` is. Cost: the exact reference one run and a sweep per t (memory: T
    states); an estimator that may be used online one run and an answer per t; any other a run of t
    steps for each t.

    Args:
        estimators: to be compared; calibrate HyperDistill beforehand (:func:`calibrated`).
        problem: the problem.
        at: horizons t, default 1 … T.
        exact: the reference; an offline one other than ``RMD(Full())`` needs ``shared_run=False``
            if its trajectory is used up by a sweep.
        shared_run: whether the reference answers at every t along one run.

    Raises:
        ValueError: for a t that the problem does not reach.
    """
    at = _checked(at, problem)
    truth = {point.t: point for point in answers(exact, problem, at, shared_run=shared_run)}
    points = []
    for name, estimator in named(estimators).items():
        for got in answers(estimator, problem, at, shared_run=estimator.online):
            want = truth[got.t]
            points.append(Point(name, got.t, closeness(got.total, want.total), closeness(got.indirect, want.indirect)))
    return Alignment(
        problem.name, tuple(points), {t: (float(g.total.norm()), float(g.indirect.norm())) for t, g in truth.items()}
    )


def answers(estimator: Estimator, problem: Problem, at: Sequence[int], *, shared_run: bool) -> Iterator[Hypergradients]:
    """The hypergradients after each number of steps in ``at``, ascending; along one run, or a run for each."""
    rng = replay.snapshot(problem.w0)
    for group in [at] if shared_run else [[t] for t in at]:
        with replay.preserved(problem.w0):
            replay.restore(rng)
            yield from _along(estimator, problem, group)


def _along(estimator: Estimator, problem: Problem, at: Sequence[int]) -> list[Hypergradients]:
    step = CountedStep(problem.step, Cost())
    found = []
    lam = tree.detach(problem.lam)
    state = step.init(problem.w0, lam)
    carry = estimator.init(step, state, lam)
    outer = OuterObjective(problem.outer_loss, problem.outer_batch)
    for t in range(1, max(at) + 1):
        state, carry = estimator.advance(step, state, lam, problem.batches[t - 1], carry)
        carry = estimator.observe(step, outer, state, lam, carry)
        if t in at:
            with replay.preserved(state):
                terms = estimator.differentiate(step, outer, state, lam, carry)
            direct, indirect = (vector(tree.filled(part, lam)) for part in (terms.direct, terms.indirect))
            found.append(Hypergradients(t, direct + indirect, indirect, step.cost + Cost()))
    return found


def closeness(got: Tensor, want: Tensor) -> Closeness:
    """How close; ratios to an exact gradient of zero are NaN."""
    nan = float("nan")
    size = float(got.norm())
    exact = float(want.norm())
    if exact == 0:
        return Closeness(nan, nan, nan)
    cosine = float(torch.dot(got / size, want / exact)) if size > 0 else nan
    return Closeness(cosine, size / exact, float((got - want).norm()) / exact)


def _checked(at: Sequence[int] | None, problem: Problem) -> list[int]:
    horizon = problem.T
    at = list(range(1, horizon + 1)) if at is None else sorted(set(at))
    if not at or at[0] < 1 or at[-1] > horizon:
        raise ValueError(f"at must hold numbers of inner steps from 1 to {horizon} (the problem's batches), got {at}")
    return at
