"""Estimators side by side on your own problem: how close, how biased, how far back, how smooth, how expensive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from metaopt import replay, tree
from metaopt.diagnose.alignment import Alignment, alignment
from metaopt.diagnose.bias import Bias, bias
from metaopt.diagnose.costs import Costs, costs
from metaopt.diagnose.norms import Norms, norms
from metaopt.diagnose.results import Estimators, Result, named
from metaopt.diagnose.smoothness import Smoothness, smoothness
from metaopt.estimators import RMD, Cost, Estimator
from metaopt.estimators.base import FinishedRun
from metaopt.estimators.cost import CountedStep
from metaopt.estimators.outer import outer_gradient
from metaopt.problem import Problem
from metaopt.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class Comparison:
    """What :func:`compare` returns: one result per question; ``parts`` lists those that were asked.

    Attributes:
        alignment: cosine, norm ratio and relative error to exact, along the trajectory.
        costs: gradients, products, seconds, peak memory.
        norms: vanishing or exploding.
        smoothness: metasmoothness.
        bias: bias and variance over batches.
    """

    alignment: Alignment
    costs: Costs
    norms: Norms
    smoothness: Smoothness | None = None
    bias: Bias | None = None

    @property
    def parts(self) -> dict[str, Result]:
        """Name to result, without those that were not asked for."""
        return {name: part for name, part in vars(self).items() if part is not None}

    def as_dict(self) -> dict[str, Any]:
        """All parts, ready for JSON."""
        return {name: part.as_dict() for name, part in self.parts.items()}

    def tables(self) -> list[Table]:
        """The table of each part that was asked for."""
        return [part.table() for part in self.parts.values()]

    def figure(self) -> Figure:
        """All pictures, one panel each."""
        from matplotlib.figure import Figure

        parts = list(self.parts.values())
        figure = Figure(figsize=(8, 3.6 * len(parts)), layout="constrained")
        for axes, part in zip(figure.subplots(len(parts), squeeze=False)[:, 0], parts, strict=True):
            axes.set_title(part.title, fontsize="small")
            part.draw(axes)
        return figure

    def __repr__(self) -> str:
        """All tables as plain text."""
        return "\n\n".join(table.text() for table in self.tables())

    def _repr_html_(self) -> str:
        return "".join(table.html() for table in self.tables())


def compare(
    estimators: Estimators,
    problem: Problem,
    at: Sequence[int] | None = None,
    *,
    exact: Estimator = RMD(),
    sample: Callable[[int], Problem] | None = None,
    draws: int = 16,
    directions: int = 2,
    h: float = 1e-2,
) -> Comparison:
    """Estimators against the exact hypergradient on one problem; λ fixed, nothing is trained.

    Each part is there alone, too: :func:`~metaopt.diagnose.alignment`,
    :func:`~metaopt.diagnose.costs`, :func:`~metaopt.diagnose.norms`,
    :func:`~metaopt.diagnose.smoothness`, :func:`~metaopt.diagnose.bias`; their docstrings hold the
    equations.

    Args:
        estimators: a sequence, or name to estimator; HyperDistill is used with the θ it has
            (:func:`calibrated` fits it).
        problem: ``mo.Problem(step, outer_loss, w0, lam, batches, outer_batch)``; stacked
            meta-batches too.
        at: numbers of inner steps at which to compare, default 1 … T.
        exact: the reference.
        sample: draw to problem; with it, bias and variance over ``draws`` draws are measured too.
        draws: see ``sample``.
        directions: random directions of the metasmoothness; 0 leaves it out.
        h: its step, in units of λ.

    >>> import metaopt as mo
    >>> found = compare([mo.OneStep(), mo.HyperDistill(gamma=0.88)], mo.verify.cases.isotropic(horizon=3), at=[3])
    >>> [round(point.total.cosine, 6) for point in found.alignment.points]
    [1.0, 1.0]
    """
    everyone = named(estimators)
    return Comparison(
        alignment(everyone, problem, at, exact=exact),
        costs(everyone, problem),
        norms(problem),
        smoothness(problem, h, directions) if directions else None,
        bias(everyone, sample, draws, exact=exact) if sample is not None else None,
    )


def finished_run(problem: Problem, cost: Cost | None = None) -> FinishedRun:
    """One inner run with λ fixed, for :meth:`~metaopt.estimators.Estimator.calibrate`."""
    step = CountedStep(problem.step, Cost() if cost is None else cost)
    lam = tree.detach(problem.lam)
    with replay.preserved(problem.w0):
        first = state = step.init(problem.w0, lam)
        for batch in problem.batches:
            state = step(state, lam, batch)
        _, alpha, _ = outer_gradient(problem.outer_loss, state.w, lam, problem.outer_batch)
    return FinishedRun(first, state, list(problem.batches), alpha)


def calibrated(estimators: Estimators, problem: Problem) -> dict[str, Estimator]:
    """The estimators with settings fitted to one run of the problem (HyperDistill's θ), under the same names."""
    run = finished_run(problem)
    return {name: estimator.calibrate(problem.step, problem.lam, run) for name, estimator in named(estimators).items()}
