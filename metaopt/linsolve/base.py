"""What a linear solver is here: ``alpha ↦ x`` with ``x K = alpha``, given only products ``v ↦ v K``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

from metaopt.tree import Tree

Operator: TypeAlias = Callable[[Tree], Tree]
"""``v ↦ v K``: a vector-matrix product with ``K = I - A``, over pytrees like the weights."""


class Solver(Protocol):
    """A (possibly approximate) solver. ``rate`` scales gradient descent's ``K = rate · H``; ``None``: the inner learning rate."""

    @property
    def rate(self) -> float | None:
        """See the class."""
        ...

    def solve(self, operator: Operator, alpha: Tree) -> Tree:
        """``x`` with ``x K ≈ alpha``."""
        ...
