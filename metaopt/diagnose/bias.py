"""Bias and variance over batches: what is wrong on average, and what scatters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from metaopt.diagnose.alignment import answers
from metaopt.diagnose.results import Estimators, Result, named
from metaopt.estimators import RMD, Estimator
from metaopt.problem import Problem


class BiasRow(NamedTuple):
    """One estimator; everything but the cosine in units of ``‖E g*‖``.

    Attributes:
        estimator: its name.
        bias: norm of the mean difference to the exact hypergradient.
        standard_error: of that mean difference, from its scatter over the draws: a bias below twice
            this is not distinguishable from none.
        deviation: square root of the variance (summed over coordinates, divided by n).
        rmse: root mean squared distance to ``E g*``.
        cosine: between the means.
    """

    estimator: str
    bias: float
    standard_error: float
    deviation: float
    rmse: float
    cosine: float


@dataclass(frozen=True, repr=False)
class Bias(Result):
    r"""What :func:`bias` returns.

    For draws ξ of the data, :math:`g(\xi)` the estimate and :math:`g^*(\xi)` the exact
    hypergradient of the whole run,

    .. math::
        \text{bias} = \mathbb{E}\,[g - g^*], \qquad \text{variance} = \mathbb{E}\,\|g - \mathbb{E} g\|^2, \qquad
        \mathbb{E}\,\|g - \mathbb{E} g^*\|^2 = \|\text{bias}\|^2 + \text{variance}

    A method that sees only the last steps is *short-horizon biased*: Wu et al. 2018, "Understanding
    short-horizon bias in stochastic meta-optimization", `arXiv 1803.02021
    <https://arxiv.org/abs/1803.02021>`__.

    Attributes:
        problem: its name.
        horizon: T.
        draws: how many.
        exact_norm: ``‖E g*‖``.
        estimates: one row per estimator, the exact one first.
    """

    problem: str
    horizon: int
    draws: int
    exact_norm: float
    estimates: tuple[BiasRow, ...]

    @property
    @override
    def title(self) -> str:
        over = f"{self.draws} draws of the batches, T = {self.horizon}"
        return f"{self.problem}: bias and scatter over {over}, in units of |E g*|"

    @override
    def rows(self) -> list[dict[str, Any]]:
        return [row._asdict() for row in self.estimates]

    def draw(self, axes: Any) -> None:
        """Bias (with two standard errors) and deviation, side by side."""
        places = range(len(self.estimates))
        axes.bar(
            [i - 0.2 for i in places],
            [r.bias for r in self.estimates],
            0.4,
            yerr=[2 * r.standard_error for r in self.estimates],
            label="bias",
        )
        axes.bar([i + 0.2 for i in places], [r.deviation for r in self.estimates], 0.4, label="standard deviation")
        axes.set_xticks(list(places), [r.estimator for r in self.estimates], rotation=20, ha="right")
        axes.set_ylabel("relative to the mean exact norm")
        axes.legend(fontsize="small")


def bias(
    estimators: Estimators,
    sample: Callable[[int], Problem],
    draws: int | Sequence[int] = 16,
    *,
    exact: Estimator = RMD(),
    horizon: int | None = None,
) -> Bias:
    """Bias and variance over draws of the data. Cost: each estimator, and the exact one, once per draw.

    Args:
        estimators: to be compared.
        sample: draw to problem: the same step, λ and w0, other batches.
        draws: their number, or their seeds.
        exact: the reference.
        horizon: T, default all batches of the first problem.

    Raises:
        ValueError: for fewer than two draws.
    """
    seeds = list(range(draws)) if isinstance(draws, int) else list(draws)
    if len(seeds) < 2:
        raise ValueError(f"bias and variance need at least two draws, got {len(seeds)}")
    everyone = {"exact": exact, **named(estimators)}
    first = sample(seeds[0])
    horizon = len(first.batches) if horizon is None else horizon
    samples: dict[str, list[Tensor]] = {name: [] for name in everyone}
    for i, seed in enumerate(seeds):
        problem = first if i == 0 else sample(seed)
        for name, estimator in everyone.items():
            samples[name] += [got.total for got in answers(estimator, problem, [horizon], shared_run=True)]
    stacked = {name: torch.stack(values) for name, values in samples.items()}
    rows = tuple(_row(name, values, stacked["exact"]) for name, values in stacked.items())
    return Bias(first.name, horizon, len(seeds), float(stacked["exact"].mean(0).norm()), rows)


def _row(name: str, got: Tensor, exact: Tensor) -> BiasRow:
    truth = exact.mean(0)
    mean = got.mean(0)
    unit = float(truth.norm()) or math.nan
    difference = got - exact
    scatter = float((difference - difference.mean(0)).square().sum())
    variance = float((got - mean).square().sum(1).mean())
    off = float((mean - truth).norm())
    size = float(mean.norm())
    n = len(got)
    cosine = float(mean @ truth) / (size * unit) if size > 0 else math.nan
    return BiasRow(
        name,
        off / unit,
        math.sqrt(scatter / (n * (n - 1))) / unit,
        math.sqrt(variance) / unit,
        math.hypot(off, variance**0.5) / unit,
        cosine,
    )
