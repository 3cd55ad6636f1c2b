"""The one home of checks on settings: each names the class, the field, the value, and what is allowed.

A setting may be a number, or something that gives one later: a tensor, a pytree, a function of λ.
Numbers are checked here. Tensors, containers and functions pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, Literal

import torch

Closed = Literal["both", "left", "right", "neither"]
"""Which ends belong to an interval."""

_DEFERRED = (torch.Tensor, Mapping, list, tuple)


def finite(owner: object, name: str, value: Any) -> None:
    """A number that is neither NaN nor infinite."""
    if _is_number(owner, name, value) and not math.isfinite(value):
        raise ValueError(f"{_place(owner, name)} must be a finite number, got {value!r}")


def positive(owner: object, name: str, value: Any) -> None:
    """A finite number above 0.

    >>> positive("Neumann", "rate", 0.0)
    Traceback (most recent call last):
        ...
    ValueError: Neumann: rate must be a number above 0, got 0.0
    """
    if _is_number(owner, name, value) and not 0 < value < math.inf:
        raise ValueError(f"{_place(owner, name)} must be a number above 0, got {value!r}")


def non_negative(owner: object, name: str, value: Any) -> None:
    """A finite number that is at least 0."""
    if _is_number(owner, name, value) and not 0 <= value < math.inf:
        raise ValueError(f"{_place(owner, name)} must not be negative, nor NaN or infinite, got {value!r}")


def within(owner: object, name: str, value: Any, low: float, high: float, *, closed: Closed = "both") -> None:
    """A number from ``low`` to ``high``; ``closed`` says which ends belong to them.

    >>> within("Adam", "betas", 1.0, 0, 1, closed="left")
    Traceback (most recent call last):
        ...
    ValueError: Adam: betas must lie in [0, 1), got 1.0
    """
    if not _is_number(owner, name, value):
        return
    from_low = value >= low if closed in ("both", "left") else value > low
    to_high = value <= high if closed in ("both", "right") else value < high
    if not (from_low and to_high):
        left = "[" if closed in ("both", "left") else "("
        right = "]" if closed in ("both", "right") else ")"
        raise ValueError(f"{_place(owner, name)} must lie in {left}{low}, {high}{right}, got {value!r}")


def unit_interval(owner: object, name: str, value: Any, *, closed: Closed = "both") -> None:
    """A number from 0 to 1; ``closed`` says which ends belong to them."""
    within(owner, name, value, 0, 1, closed=closed)


def count(owner: object, name: str, value: Any, *, at_least: int = 1) -> None:
    """A whole number from ``at_least`` on.

    >>> count("Accumulate", "every", 2.5)
    Traceback (most recent call last):
        ...
    TypeError: Accumulate: every must be a whole number, at least 1, got 2.5
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{_place(owner, name)} must be a whole number, at least {at_least}, got {value!r}")
    if value < at_least:
        raise ValueError(f"{_place(owner, name)} must be at least {at_least}, got {value!r}")


def flag(owner: object, name: str, value: Any) -> None:
    """Something that is ``True`` or ``False``."""
    if not isinstance(value, bool):
        raise TypeError(f"{_place(owner, name)} must be True or False, got {value!r}")


def function(owner: object, name: str, value: Any, signature: str) -> None:
    """Something that can be called; ``signature`` tells the reader how."""
    if not callable(value):
        raise TypeError(f"{_place(owner, name)} must be a function {signature}, got {type(value).__name__} {value!r}")


def instance(owner: object, name: str, value: Any, kind: type | tuple[type, ...], remedy: str = "") -> None:
    """An instance of ``kind``; ``remedy`` tells what to pass instead.

    >>> instance("RMD", "trajectory", 3, str, "for instance mo.trajectory.Full()")
    Traceback (most recent call last):
        ...
    TypeError: RMD: trajectory must be of type str, got int 3: for instance mo.trajectory.Full()
    """
    if isinstance(value, kind):
        return
    kinds = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
    hint = f": {remedy}" if remedy else ""
    if isinstance(value, type):
        got = f"the class {value.__name__} (with parentheses it would be an instance)"
    else:
        got = f"{type(value).__name__} {value!r}"
    raise TypeError(f"{_place(owner, name)} must be of type {kinds}, got {got}{hint}")


def provides(owner: object, name: str, value: Any, method: str, remedy: str) -> None:
    """Something with a method of that name; ``remedy`` tells what to pass instead."""
    if isinstance(value, type) or not callable(getattr(value, method, None)):
        raise TypeError(f"{_place(owner, name)} is {value!r}, which has no {method}(): give {remedy}")


def one_of(owner: object, name: str, value: Any, allowed: Sequence[Any]) -> None:
    """One of a few values."""
    if not any(value is each or (type(value) is type(each) and value == each) for each in allowed):
        raise ValueError(f"{_place(owner, name)} must be one of {list(allowed)}, got {value!r}")


def pair(owner: object, name: str, value: Any) -> None:
    """A tuple of two entries (or a function that gives one)."""
    if callable(value):
        return
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{_place(owner, name)} must be a pair, got {value!r}")


def _is_number(owner: object, name: str, value: Any) -> bool:
    """Whether there is a number to be checked now.

    Raises:
        TypeError: if it is not a number and cannot give one later either.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return True
    if isinstance(value, _DEFERRED) or callable(value):
        return False
    raise TypeError(f"{_place(owner, name)} must be a number, got {type(value).__name__} {value!r}")


def _place(owner: object, name: str) -> str:
    label = owner if isinstance(owner, str) else type(owner).__name__
    return f"{label}: {name}"
