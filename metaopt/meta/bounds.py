"""Projections of λ onto bounds: ``lr ≥ 0``, ``0 ≤ momentum < 1``, ``weight decay ≥ 0``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from metaopt import tree
from metaopt.tree import Tree


def bounded(limits: Tree) -> Callable[[Tree], Tree]:
    """``lam -> lam`` with every entry clamped to its bounds; for ``project=`` of the loops.

    Args:
        limits: a pytree like λ with a pair ``(lowest, highest)`` for each leaf, or one pair for all
            leaves; ``None`` means unbounded. Bounds are inclusive: for a momentum below 1 give the
            largest that you would use, e.g. ``(0.0, 0.99)``.

    Raises:
        ValueError: if a lowest is above its highest; on use, if the limits are not like λ.

    >>> import torch
    >>> project = bounded({"lr": (0.0, None), "momentum": (0.0, 0.99)})
    >>> project({"lr": torch.tensor([-0.1, 0.3]), "momentum": torch.tensor(1.2)})
    {'lr': tensor([0.0000, 0.3000]), 'momentum': tensor(0.9900)}
    """
    _check(limits)

    def project(lam: Tree) -> Tree:
        if _is_pair(limits):
            return tree.map(lambda x: _clamped(x, limits), lam)
        try:
            return tree.map(_clamped, lam, limits)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"bounded: the limits {limits!r} are not like lam, whose leaves are {tree.names(lam)}"
            ) from error

    return project


def _is_pair(value: Any) -> bool:
    return (
        type(value) is tuple and len(value) == 2 and all(end is None or isinstance(end, (int, float)) for end in value)
    )


def _clamped(x: Tensor, pair: Any) -> Tensor:
    if not _is_pair(pair):
        raise ValueError(f"{pair!r} is not a pair (lowest, highest)")
    return x if pair == (None, None) else x.clamp(*pair)


def _check(limits: Tree) -> None:
    if _is_pair(limits):
        low, high = limits
        for end in limits:
            if end is not None and end != end:
                raise ValueError(f"bounded: a bound is a number, got {limits!r}")
        if low is not None and high is not None and low > high:
            raise ValueError(f"bounded: the lowest value {low} is above the highest {high}")
        return
    children = limits.values() if isinstance(limits, dict) else limits if isinstance(limits, (list, tuple)) else None
    if children is None:
        raise ValueError(f"bounded: {limits!r} is not a pair (lowest, highest)")
    for child in children:
        _check(child)
