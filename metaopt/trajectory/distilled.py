r"""HyperDistill's memory: one state and one batch that stand for the whole run (equations 13, 14, 17, 18).

.. math::
    w^*_t = p_t w^*_{t-1} + (1 - p_t) w_{t-1}, \qquad D^*_t = SS(D^*_{t-1}, p_t) \cup SS(D_t, 1 - p_t),
    \qquad p_t = \frac{\gamma - \gamma^t}{1 - \gamma^t}

Lee et al. 2022, "Online hyperparameter meta-learning with hypergradient distillation", arXiv
2110.02508.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaopt import tree
from metaopt.inner.state import InnerState


class Distillate(NamedTuple):
    """``w*_t`` (with the slots averaged alike), ``D*_t``, and t: how many steps have gone in."""

    state: InnerState
    batch: Any
    t: int


@dataclass(frozen=True)
class Distilled:
    """The running distillates.

    ``|D*| = |D|`` always: k of the old examples and ``|D| - k`` of the new ones. Where the new
    batch *is* the old one (the same tensors: full-batch training), the union of subsamples is that
    batch, and nothing is drawn.

    Args:
        gamma: decay γ in [0, 1].
        example_axis: axis of every batch tensor that runs over examples (1 for a stacked
            meta-batch, whose axis 0 are tasks).
        stochastic_rounding: ``k = ⌊p|D|⌋`` or one more, so that its mean is ``p|D|``. With plain
            rounding, a small ``|D|`` and γ near 1 let no new example in after a while (|D| = 10, γ
            ≥ .99: from t ≈ 22).
        seed: of the subsampling; the global random state is not used.
    """

    gamma: float
    example_axis: int = 0
    stochastic_rounding: bool = False
    seed: int = 0

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
        old_flat, new_flat = tree.leaves(old), tree.leaves(new)
        if all(a is b for a, b in zip(old_flat, new_flat, strict=True)):
            return new
        axis = self.example_axis
        size = next((x.shape[axis] for x in new_flat if isinstance(x, Tensor) and x.ndim > axis), None)
        if size is None:
            return new
        generator = torch.Generator().manual_seed(hash((self.seed, t)) & 0x7FFF_FFFF)
        kept = self._count(p * size, generator)
        if kept == 0:
            return new
        from_old = torch.randperm(size, generator=generator)[:kept]
        from_new = torch.randperm(size, generator=generator)[: size - kept]

        def union(a: Any, b: Any) -> Any:
            if not (isinstance(b, Tensor) and b.ndim > axis and b.shape[axis] == size and a.shape == b.shape):
                return b
            if kept == size:
                return a
            return torch.cat(
                [a.index_select(axis, from_old.to(b.device)), b.index_select(axis, from_new.to(b.device))], axis
            )

        return tree.map(union, old, new)

    def _count(self, expected: float, generator: torch.Generator) -> int:
        if not self.stochastic_rounding:
            return math.floor(expected + 0.5)
        below = math.floor(expected)
        return below + int(torch.rand((), generator=generator).item() < expected - below)


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
