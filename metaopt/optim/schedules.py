"""Schedules: hyperparameters that depend on the step, as callables ``(lam, t)`` with t = 1 … T.

``peak`` and ``values`` may be numbers, tensors, or functions of λ; whatever depends on λ is
differentiated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

from metaopt.tree import Tree

Schedule: TypeAlias = Callable[[Tree, int], Any]


def constant(peak: Any) -> Schedule:
    """``peak``, the same at every step."""
    return lambda lam, t: _of(peak, lam)


def cosine(peak: Any, horizon: int, floor: float = 0.0) -> Schedule:
    r""":math:`f + (\text{peak} - f)\,\tfrac12 (1 + \cos(\pi (t-1)/T))`.

    From the peak at t = 1 towards the floor at T.
    """
    _positive(horizon, "horizon")

    def schedule(lam: Tree, t: int) -> Any:
        share = 0.5 * (1 + math.cos(math.pi * min(t - 1, horizon) / horizon))
        return floor + (_of(peak, lam) - floor) * share

    return schedule


def step_decay(peak: Any, every: int, factor: float = 0.1) -> Schedule:
    r""":math:`\text{peak} \cdot \text{factor}^{\lfloor (t-1)/\text{every} \rfloor}`."""
    _positive(every, "every")
    return lambda lam, t: _of(peak, lam) * factor ** ((t - 1) // every)


def warm_up(schedule: Any, steps: int) -> Schedule:
    """``schedule`` times ``min(1, t / steps)``."""
    _positive(steps, "steps")

    def warmed(lam: Tree, t: int) -> Any:
        value: Any = schedule(lam, t) if callable(schedule) else schedule
        return value * min(1.0, t / steps)

    return warmed


def piecewise(values: Any, horizon: int) -> Schedule:
    r"""Entry :math:`\lfloor n (t-1)/T \rfloor` of n values: piecewise constant over equal windows.

    Args:
        values: a tensor, or a function of λ that gives one.
        horizon: T.
    """
    _positive(horizon, "horizon")

    def schedule(lam: Tree, t: int) -> Any:
        entries = _of(values, lam)
        return entries[min(len(entries) * (t - 1) // horizon, len(entries) - 1)]

    return schedule


def _of(value: Any, lam: Tree) -> Any:
    return value(lam) if callable(value) else value


def _positive(number: int, name: str) -> None:
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
