"""The state that one inner step carries to the next."""

from __future__ import annotations

from typing import NamedTuple

from metaopt.tree import Tree


class InnerState(NamedTuple):
    """Weights and optimiser slots: everything a step Φ changes, and so everything a hypergradient flows through.

    Attributes:
        w: the weights, any pytree of floating-point tensors.
        slots: the optimiser's memory (momentum, second moments, …), any pytree; ``{}`` where there
            is none. In a cotangent, ``None`` stands for zero.
        t: steps taken so far; the step that leaves this state is number ``t + 1``.
    """

    w: Tree
    slots: Tree = {}  # noqa: RUF012  (never mutated: states are values)
    t: int = 0
