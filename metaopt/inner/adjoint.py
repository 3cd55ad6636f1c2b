"""The second-order part of the step adjoint: what a mode is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from metaopt import tree
from metaopt.inner import _engine
from metaopt.tree import Tree

Loss: TypeAlias = Callable[[Tree, Tree, Any], Tensor]
Products: TypeAlias = list[Tensor | None]


class GradientWithGraph(Protocol):
    """The gradient with its graph at hand: any derivative of it can be taken."""

    def joint(self) -> list[Tensor | None]:
        """``(∇_w L, ∇_λ L)``, one per leaf of w and per float leaf of λ, with their graph."""
        ...

    @property
    def inputs(self) -> tuple[list[Tensor], list[Tensor]]:
        """The autograd leaves of w and of λ that these are functions of."""
        ...


class Gradient(Protocol):
    """The gradient of the inner loss at one point, and its second-order products."""

    @property
    def value(self) -> Tensor:
        """The value of the inner loss there, detached."""
        ...

    @property
    def g(self) -> Tree:
        """``∇_w L``, a pytree like w (it may carry a graph).

        ``None`` where the loss does not reach a weight.
        """
        ...

    def contract(
        self, u: list[Tensor], *, with_w: bool, with_lam: bool, last: bool = False
    ) -> tuple[Products, Products]:
        """``(uᵀ ∂²L/∂w², uᵀ ∂²L/∂w∂λ)``, per leaf of w and per float leaf of λ; ``None`` is zero.

        A part not asked for is empty.

        ``u`` has one entry per leaf of w. ``last`` promises that no further product is asked for:
        memory is then given back as the graph is swept.
        """
        ...

    def graph(self) -> GradientWithGraph:
        """The same gradient, with its graph at hand."""
        ...


class Gradients(Protocol):
    """A mode at work on one loss."""

    def gradient(self, w: Tree, lam: Tree, batch: Any) -> Gradient:
        """The gradient at a point, ready for products. Cost: one gradient."""
        ...


class Adjoint(Protocol):
    r"""A mode: how second-order products are taken. A setting.

    What it learns of a loss is in :class:`Gradients`.

    With :math:`g = \nabla_w L(w, \lambda)` and a cotangent u of it, what is needed is
    :math:`(u^\top \partial^2 L/\partial w^2,\; u^\top \partial^2 L/\partial w \partial\lambda)`.
    """

    def of(self, loss: Loss) -> Gradients:
        """The mode at work on this loss."""
        ...


def gradient_of(loss: Tensor, leaves: list[Tensor], *, graph: bool) -> list[Tensor | None]:
    """The gradient of a scalar, with its own graph or without; ``None`` where it does not reach a leaf.

    Under autocast, torch keeps the cast of every autograd leaf until the context ends, and each
    step has new leaves: that memory would grow with the run, so the casts are let go here.
    """
    if not loss.requires_grad:
        return [None] * len(leaves)
    gradients = _engine.products([loss], leaves, [torch.ones_like(loss)], create_graph=graph)
    torch.clear_autocast_cache()
    return list(gradients)


def check_reached(gradients: Sequence[Tensor | None]) -> None:
    """Raise a ``ValueError`` if the inner loss reaches no weight at all."""
    if all([g is None for g in gradients]):
        raise ValueError(
            "inner_loss does not depend on the weights, or its graph was cut (detach, no_grad, .item(), an "
            "integer operation)"
        )


def like(w: Tree, flat: list[Any]) -> Tree:
    """Leaves as a pytree like ``w``."""
    return tree.unflatten(flat, tree.Spec(w, len(flat)))
