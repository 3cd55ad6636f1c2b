"""HyperDistill's memory: one state and one batch that stand for the whole run (equations 13, 14, 17, 18)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaopt import checks, tree
from metaopt.inner.state import InnerState


class Distillate(NamedTuple):
    """``w*_t`` (with the slots averaged alike), ``D*_t``, and t: how many steps have gone in."""

    state: InnerState
    batch: Any
    t: int


@dataclass(frozen=True)
class Distilled:
    r"""The running distillates.

    .. math::
        w^*_t = p_t w^*_{t-1} + (1 - p_t) w_{t-1}, \qquad D^*_t = SS(D^*_{t-1}, p_t) \cup SS(D_t, 1
        - p_t), \qquad p_t = \frac{\gamma - \gamma^t}{1 - \gamma^t}

    Lee et al. 2022, "Online hyperparameter meta-learning with hypergradient distillation", `arXiv
    2110.02508 <https://arxiv.org/abs/2110.02508>`__.

    ``|D*| = |D|`` always: k of the old examples and ``|D| - k`` of the new ones. Where the new
    batch *is* the old one (the same tensors: full-batch training), the union of subsamples is that
    batch, and nothing is drawn.

    Args:
        gamma: decay γ in [0, 1].
        example_axis: axis of every batch tensor that runs over examples (1 for a stacked
            meta-batch, whose axis 0 are tasks).
        stochastic_rounding: ``k = ⌊p|D|⌋`` or one more, so that its mean is ``p|D|``. With plain
            rounding, a small ``|D|`` and γ near 1 let no new example in after a while (``|D| = 10``, γ
            ≥ .99: from t ≈ 22).
        seed: of the subsampling; the global random state is not used.
    """

    gamma: float
    example_axis: int = 0
    stochastic_rounding: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        checks.unit_interval(self, "gamma", self.gamma)
        checks.count(self, "example_axis", self.example_axis, at_least=0)
        checks.flag(self, "stochastic_rounding", self.stochastic_rounding)
        checks.count(self, "seed", self.seed, at_least=0)

    def start(self, state: InnerState, batch: Any) -> Distillate:
        """The distillate of one step."""
        return Distillate(state, batch, 1)

    def append(self, old: Distillate, state: InnerState, batch: Any) -> Distillate:
        """Take in a step that is *newer* than what is there (equations 13, 14)."""
        t = old.t + 1
        return self._mix(old, state, batch, keep_newest(self.gamma, t), t)

    def prepend(self, old: Distillate, state: InnerState, batch: Any) -> Distillate:
        """Take in a step that is *older* than what is there (equations 17, 18)."""
        t = old.t + 1
        return self._mix(old, state, batch, keep_oldest(self.gamma, t), t)

    def _mix(self, old: Distillate, state: InnerState, batch: Any, p: float, t: int) -> Distillate:
        mixed = state if p == 0.0 else old.state if p == 1.0 else tree.lerp(old.state, state, 1.0 - p)
        return Distillate(mixed._replace(t=state.t), self._union(old.batch, batch, p, t), t)

    def _union(self, old: Any, new: Any, p: float, t: int) -> Any:
        """Some examples of each: an example is one row of every tensor that has rows."""
        pairs = list(zip(tree.leaves(old), tree.leaves(new), strict=True))
        if all([a is b for a, b in pairs]):
            return new
        axis = self.example_axis
        rows = next((b.shape[axis] for _, b in pairs if isinstance(b, Tensor) and b.ndim > axis), None)
        before = next((a.shape[axis] for a, _ in pairs if isinstance(a, Tensor) and a.ndim > axis), None)
        check_mixable(tree.names(new), pairs, axis, before, rows)
        if rows is None or before is None:
            return new
        generator = torch.Generator().manual_seed(hash((self.seed, t)) & 0x7FFF_FFFF)
        kept = min(self._count(p * rows, generator), before)
        if kept == 0:
            return new
        from_old = torch.randperm(before, generator=generator)[:kept]
        from_new = torch.randperm(rows, generator=generator)[: rows - kept]

        def union(a: Any, b: Any) -> Any:
            if not has_rows(b, axis, rows):
                return b
            if kept == rows == before:
                return a
            parts = a.index_select(axis, from_old.to(b.device)), b.index_select(axis, from_new.to(b.device))
            return torch.cat(parts, axis)

        return tree.map(union, old, new)

    def _count(self, expected: float, generator: torch.Generator) -> int:
        if not self.stochastic_rounding:
            return math.floor(expected + 0.5)
        below = math.floor(expected)
        return below + int(torch.rand((), generator=generator).item() < expected - below)


def has_rows(leaf: Any, axis: int, rows: int | None) -> bool:
    """Whether a leaf of a batch holds one row for each example."""
    return isinstance(leaf, Tensor) and leaf.ndim > axis and leaf.shape[axis] == rows


def check_mixable(
    names: list[str], pairs: list[tuple[Any, Any]], axis: int, before: int | None, rows: int | None
) -> None:
    """Refuse batches whose examples cannot be put together.

    Raises:
        ValueError: if the rows of a tensor have another shape in the two batches.
        TypeError: if a leaf may hold tensors that are not seen.
    """
    for name, (a, b) in zip(names, pairs, strict=True):
        if not isinstance(b, _PLAIN):
            raise TypeError(
                f"a batch for distillation is a pytree of tensors, and {name or 'the batch'} is a "
                f"{type(b).__module__}.{type(b).__name__}: its examples would be left out. Make it a tensor, or the "
                "batch a dict, tuple or NamedTuple of tensors"
            )
        if not has_rows(b, axis, rows):
            continue
        fits = has_rows(a, axis, before) and _row_shape(a, axis) == _row_shape(b, axis)
        if not fits:
            shapes = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in (a, b)]
            raise ValueError(
                f"examples of two batches are to be mixed, and {name or 'the batch'} has the shapes {shapes[0]} and "
                f"{shapes[1]}: pad all batches to one length, or use RMD, TruncatedRMD or OneStep"
            )


_PLAIN = (Tensor, int, float, str, bytes, type(None), torch.dtype, torch.device)


def _row_shape(leaf: Any, axis: int) -> tuple[int, ...]:
    return (*leaf.shape[:axis], *leaf.shape[axis + 1 :])


def geometric_sum(gamma: float, t: int) -> float:
    r""":math:`S_t = \sum_{i \le t} \gamma^{t-i}`, which is t for γ = 1."""
    return float(t) if gamma == 1.0 else (1.0 - gamma**t) / (1.0 - gamma)


def keep_newest(gamma: float, t: int) -> float:
    r""":math:`p_t = (\gamma - \gamma^t)/(1 - \gamma^t)`.

    The share of the old when the newest is appended; (t-1)/t for γ = 1.
    """
    return (t - 1) / t if gamma == 1.0 else (gamma - gamma**t) / (1.0 - gamma**t)


def keep_oldest(gamma: float, s: int) -> float:
    r""":math:`p_s = (1 - \gamma^{s-1})/(1 - \gamma^s)`.

    The share of the rest when the oldest is put before it; (s-1)/s for γ = 1.
    """
    return (s - 1) / s if gamma == 1.0 else (1.0 - gamma ** (s - 1)) / (1.0 - gamma**s)
