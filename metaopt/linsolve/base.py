"""What a linear solver is here: ``alpha ↦ x`` with ``x K = alpha``, given only products ``v ↦ v K``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from metaopt import tree
from metaopt.tree import Tree

Operator: TypeAlias = Callable[[Tree], Tree]
"""``v ↦ v K``: a vector-matrix product with ``K = I - A``, over pytrees like the weights."""


class Solution(NamedTuple):
    """What a solver found.

    Attributes:
        x: with ``x K ≈ alpha``, a pytree like ``alpha``.
        residual: ``‖alpha - x K‖ / ‖alpha‖`` (0-dimensional; 0 where ``alpha`` is zero). K includes
            the solver's damping.
        products: products with K that were taken.
        memory: what a next solve may use (a sketch of K), or ``None``.
    """

    x: Tree
    residual: Tensor
    products: int
    memory: Any = None


class Solver(Protocol):
    """Solves ``x K = alpha`` for x, exactly or approximately."""

    @property
    def descent_rate(self) -> float | None:
        """The a of gradient descent's ``K = a · H``; ``None``: the inner learning rate.

        1 unless the method needs another: the operator is then the Hessian itself (or ``I - A`` of
        a custom Φ).
        """
        return 1.0

    def solve(self, operator: Operator, alpha: Tree, memory: Any = None) -> Solution:
        """``x`` with ``x K ≈ alpha``.

        ``memory`` is that of an earlier solution, for a K that may have moved since.
        """
        ...


def solve_from(solver: Solver, operator: Operator, alpha: Tree, start: Solution | None) -> Solution:
    """A warm start, for any solver: its correction of an earlier solution, ``x = x_0 + solve(alpha - x_0 K)``.

    Costs one product more, and no other where ``x_0`` is within the solver's tolerance.
    """
    if start is None:
        return solver.solve(operator, alpha)
    tree.check_like(start.x, alpha, "the warm start", "alpha")
    left = tree.sub(alpha, operator(start.x))
    share = ratio(tree.norm(left), tree.norm(alpha))
    if bool(share <= getattr(solver, "tolerance", 0.0)):
        return Solution(start.x, share, 1, start.memory)
    found = solver.solve(operator, left, start.memory)
    return Solution(tree.add(start.x, found.x), found.residual * share, found.products + 1, found.memory)


def damped(operator: Operator, damping: float) -> Operator:
    """``v ↦ v (K + damping · I)``."""
    return operator if damping == 0 else lambda v: tree.add(operator(v), tree.scale(damping, v))


def relative_residual(operator: Operator, x: Tree, alpha: Tree) -> Tensor:
    """``‖alpha - x K‖ / ‖alpha‖``. Cost: one product."""
    left = tree.sub(alpha, operator(x))
    return ratio(tree.norm(left), tree.norm(alpha))


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """A quotient of norms, 0 where both are 0."""
    return torch.where(numerator > 0, numerator / denominator, torch.zeros_like(numerator))
