"""What an estimator costs on a problem: counted, timed and weighed."""

from __future__ import annotations

import statistics
import time
import warnings
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from typing_extensions import override

from metaopt import tree
from metaopt.diagnose.results import Estimators, Result, named
from metaopt.estimators import Cost, Estimator, Hypergradient, ZeroHypergradientWarning, hypergradient
from metaopt.problem import Problem
from metaopt.verify.memory import peak_bytes


class Expense(NamedTuple):
    """One hypergradient at the horizon, the inner run included.

    Attributes:
        estimator: its name.
        work: counted, in units that do not depend on the machine.
        seconds: median over the repeats.
        peak_bytes: see :mod:`metaopt.verify.memory`; ``None`` if it was not measured.
    """

    estimator: str
    work: Cost
    seconds: float
    peak_bytes: int | None

    @property
    def gradients(self) -> int:
        """Evaluations of the inner gradient, with or without its graph."""
        return self.work.steps + self.work.linearizations


@dataclass(frozen=True, repr=False)
class Costs(Result):
    """What :func:`costs` returns.

    Attributes:
        problem: its name.
        horizon: T.
        expenses: one per estimator.
    """

    problem: str
    horizon: int
    expenses: tuple[Expense, ...]

    @property
    @override
    def title(self) -> str:
        return f"{self.problem}: cost of one hypergradient, T = {self.horizon}"

    @override
    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                "estimator": e.estimator,
                "gradients": e.gradients,
                **_others(e.work),
                "seconds": e.seconds,
                "peak bytes": e.peak_bytes,
            }
            for e in self.expenses
        ]

    def draw(self, axes: Any) -> None:
        """Gradients and products as bars."""
        names = [e.estimator for e in self.expenses]
        places = range(len(names))
        axes.bar([i - 0.2 for i in places], [e.gradients for e in self.expenses], 0.4, label="gradients")
        axes.bar(
            [i + 0.2 for i in places],
            [e.work.products + e.work.tangents for e in self.expenses],
            0.4,
            label="products, tangents",
        )
        axes.set_xticks(list(places), names, rotation=20, ha="right")
        axes.legend(fontsize="small")


def costs(
    estimators: Estimators, problem: Problem, *, horizon: int | None = None, repeats: int = 3, memory: bool = True
) -> Costs:
    """Gradient evaluations, products, tangents, seconds and peak memory of one hypergradient.

    Args:
        estimators: to be compared.
        problem: the problem.
        horizon: T, default all batches.
        repeats: runs that are timed, after one that is not; the estimators take turns.
        memory: whether to measure the peak too, in one more run.
    """
    everyone = named(estimators)
    counts = {name: _run(estimator, problem, horizon).cost for name, estimator in everyone.items()}
    times: dict[str, list[float]] = {name: [] for name in everyone}
    for _ in range(repeats):
        for name, estimator in everyone.items():
            start = time.perf_counter()
            _run(estimator, problem, horizon)
            times[name].append(time.perf_counter() - start)
    device = tree.floats(problem.w0)[0].device
    found = []
    for name, estimator in everyone.items():
        peak = peak_bytes(lambda estimator=estimator: _run(estimator, problem, horizon), device) if memory else None
        found.append(Expense(name, counts[name], statistics.median(times[name]) if repeats else float("nan"), peak))
    return Costs(problem.name, horizon or problem.T, tuple(found))


def _run(estimator: Estimator, problem: Problem, horizon: int | None) -> Hypergradient:
    p = problem
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ZeroHypergradientWarning)
        result = hypergradient(
            p.step, p.outer_loss, p.w0, p.lam, p.batches, p.outer_batch, estimator=estimator, horizon=horizon
        )
    if result.outer_loss.is_cuda:
        torch.cuda.synchronize(result.outer_loss.device)
    return result


def _others(count: Cost) -> dict[str, int]:
    """Everything counted but the gradients."""
    return {key: value for key, value in asdict(count).items() if key not in ("steps", "linearizations")}
