"""Metasmoothness: whether training responds smoothly enough to its hyperparameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from metaopt import replay, tree
from metaopt.diagnose.results import Result
from metaopt.problem import Problem
from metaopt.tree import Tree
from metaopt.verify.reference import vector


class Direction(NamedTuple):
    """One direction.

    Attributes:
        direction: its number.
        metasmoothness: ``S`` of the trained weights; NaN where they do not move at all.
        first: ``(L(λ + hv) - L(λ)) / h`` of the outer loss.
        second: ``(L(λ + 2hv) - L(λ + hv)) / h``: like the first where a step of length h follows
            the gradient.
    """

    direction: int
    metasmoothness: float
    first: float
    second: float


@dataclass(frozen=True, repr=False)
class Smoothness(Result):
    r"""What :func:`smoothness` returns.

    For the trained weights :math:`\mathcal A(\lambda) = w_T`, a direction v and a step h, with
    :math:`\bar d = |\mathcal A(\lambda + 2hv) - \mathcal A(\lambda)|` per coordinate,

    .. math::
        S_{h,v}(\lambda) = \operatorname{sign}\bigl(\mathcal A(\lambda + hv) - \mathcal
        A(\lambda)\bigr)^\top
          \operatorname{diag}\Bigl(\frac{\bar d}{\|\bar d\|_1}\Bigr)
          \operatorname{sign}\bigl(\mathcal A(\lambda + 2hv) - \mathcal A(\lambda + hv)\bigr) \;\in\; [-1, 1]

    the agreement in sign of two successive differences, weighted by how far each weight moves: 1
    for a response without turning points, about 0 for noise. Engstrom et al. 2025, "Optimizing ML
    training with metagradient descent", `arXiv 2503.13751 <https://arxiv.org/abs/2503.13751>`__
    (empirical metasmoothness).

    Attributes:
        problem: its name.
        h: the step.
        directions: one row each.
    """

    problem: str
    h: float
    directions: tuple[Direction, ...]

    @property
    def mean(self) -> float:
        """Mean over the directions in which the weights move."""
        values = [row.metasmoothness for row in self.directions if not math.isnan(row.metasmoothness)]
        return sum(values) / len(values) if values else math.nan

    @property
    @override
    def title(self) -> str:
        return f"{self.problem}: metasmoothness {self.mean:.3f} at h = {self.h:g}"

    @override
    def rows(self) -> list[dict[str, Any]]:
        return [row._asdict() for row in self.directions]

    @override
    def draw(self, axes: Any) -> None:
        axes.bar([row.direction for row in self.directions], [row.metasmoothness for row in self.directions])
        axes.set(xlabel="direction", ylabel="metasmoothness", ylim=(-1.05, 1.05))


def smoothness(
    problem: Problem,
    h: float = 1e-2,
    directions: int | Sequence[Tree] = 4,
    *,
    horizon: int | None = None,
    seed: int = 0,
) -> Smoothness:
    r"""Metasmoothness along random directions. Cost: one inner run, and two per direction.

    No derivative is taken.

    Args:
        problem: the problem.
        h: length of a step along v, in units of λ.
        directions: how many Gaussian ones of norm 1 (over all of λ), or the directions themselves,
            pytrees like λ, used as they are.
        horizon: T, default all batches.
        seed: of the random directions.

    Raises:
        ValueError: for a step that is not positive.
    """
    if not h > 0:
        raise ValueError(f"h must be positive, got {h}")
    horizon = problem.T if horizon is None else horizon
    chosen = _gaussian(problem.lam, directions, seed) if isinstance(directions, int) else list(directions)
    start, loss = _trained(problem, problem.lam, horizon)
    rows = []
    for number, v in enumerate(chosen):
        tree.check_like(v, problem.lam, "direction", "lam")
        once, twice = (
            _trained(problem, tree.add(problem.lam, tree.scale(factor * h, v)), horizon) for factor in (1.0, 2.0)
        )
        rows.append(
            Direction(number, agreement(start, once[0], twice[0]), (once[1] - loss) / h, (twice[1] - once[1]) / h)
        )
    return Smoothness(problem.name, h, tuple(rows))


def agreement(start: Tensor, once: Tensor, twice: Tensor) -> float:
    """The weighted agreement in sign of ``once - start`` and ``twice - once``.

    NaN where start and twice are equal.
    """
    weight = (twice - start).abs()
    if not bool((weight > 0).any()):
        return math.nan
    return float(((once - start).sign() * (twice - once).sign() * weight).sum() / weight.sum())


def _trained(problem: Problem, lam: Tree, horizon: int) -> tuple[Tensor, float]:
    """``(w_T, L_val)`` of a plain run, with the same random draws every time."""
    with replay.preserved(problem.w0), torch.no_grad():
        state = problem.step.init(problem.w0, lam)
        for t in range(horizon):
            state = problem.step(state, lam, problem.batches[t])
        return vector(state.w), float(problem.outer_loss(state.w, lam, problem.outer_batch))


def _gaussian(lam: Tree, count: int, seed: int) -> list[Tree]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        v = tree.map(
            lambda x: torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) if tree.is_float(x) else x,
            lam,
        )
        found.append(tree.scale(1.0 / float(tree.norm(v)), v))
    return found
