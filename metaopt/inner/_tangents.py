r"""Many tangents through one step: every column is one reverse product of the same graph.

With :math:`g = \nabla_w L(w, \lambda)`, symmetry of second derivatives makes the tangent of g along
:math:`(\dot w, \dot\lambda)`

.. math::
    \dot g = H \dot w + \frac{\partial^2 L}{\partial w\, \partial\lambda}\, \dot\lambda
           = \nabla_w \left( \nabla_w L \cdot \dot w + \nabla_\lambda L \cdot \dot\lambda \right),

a vector-Jacobian product of :math:`(\nabla_w L, \nabla_\lambda L)`, whose graph all columns share.
An update that is not a gradient (:func:`metaopt.inner.reweighted`) has no such symmetry; there the
graph of the pullback is transposed instead, as for a custom step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metaopt import tree
from metaopt.inner._graph import can_be_batched
from metaopt.inner._transposed import Transposed, columns_of_numbers, columns_per_batch, dots_of, reverse_products
from metaopt.inner._update import is_linear, push_forward, split_state, update_of_floats
from metaopt.inner.adjoint import GradientWithGraph, like
from metaopt.inner.reweighted import AsymmetricUpdateError
from metaopt.inner.state import InnerState
from metaopt.optim.optimizer import Optimizer
from metaopt.tree import Tree

# Roughly how many numbers an optimiser's graph saves for each number that goes into it.
NUMBERS_PER_ENTRY = 4


class InnerTangents:
    """The tangent map of optimiser ∘ gradient.

    A column with no tangent in w, and none in the λ of the loss, has a product of zero. It is not
    computed.
    """

    __slots__ = ("_at", "_gradients", "_inputs", "_lam", "_optimizer", "_transposed", "_update", "products")

    def __init__(self, gradient: GradientWithGraph, optimizer: Optimizer, state: InnerState, lam: Tree) -> None:
        """Cost: one gradient with respect to ``(w, λ)``, whose graph is kept."""
        self._at = state
        self._lam = lam
        self._optimizer = optimizer
        self._gradients = gradient.joint()
        self._inputs = gradient.inputs
        self._transposed: Transposed | None = None
        self._update: Transposed | None = None
        self.products = 0

    @property
    def columns_at_once(self) -> int:
        """How many columns to take at once, by what the graph of the gradient has saved."""
        return columns_per_batch([g for g in self._gradients if g is not None and g.requires_grad])

    def push(
        self, state_dots: InnerState, lam_dots: Tree, *, columns_at_once: int, bound: float | None = None
    ) -> InnerState:
        """The gradient's tangents, then the optimiser's."""
        dots = tree.leaves(state_dots.w) + dots_of(lam_dots, self._lam)
        g_dots = self._gradient_tangents(dots, columns_at_once)
        if bound is not None:
            g_dots = [dot.clamp(-bound, bound) for dot in g_dots]
        present = [None if g is None else dot for g, dot in zip(self._gradients, g_dots, strict=False)]
        w_dots, slots_dots = self._through_optimizer(like(self._at.w, present), state_dots, lam_dots)
        return InnerState(w_dots, slots_dots, self._at.t + 1)

    # -- the gradient ----------------------------------------------------------------------------
    def _gradient_tangents(self, dots: list[Tensor], columns_at_once: int) -> list[Tensor]:
        w, _ = self._inputs
        columns = len(dots[0])
        # weights that stand still need ∇_λ L alone: a graph of first order
        first = 0 if len(_moving(dots[: len(w)], columns)) else len(w)
        pairs = zip(self._gradients[first:], dots[first:], strict=True)
        live = [(g, dot) for g, dot in pairs if g is not None and g.requires_grad]
        if not can_be_batched(g for g, _ in live):
            columns_at_once = 1

        rows = _moving([dot for _, dot in live], columns)
        self.products += len(rows)
        products: Sequence[Tensor | None] = [None] * len(w)
        if len(rows):
            products = self._products(live, dots, rows, columns_at_once)
        return [_spread(product, rows, columns, x) for product, x in zip(products, w, strict=True)]

    def _products(
        self, live: list[tuple[Tensor, Tensor]], dots: list[Tensor], rows: Tensor, columns_at_once: int
    ) -> Sequence[Tensor | None]:
        """The products of some columns, by symmetry where there is one."""
        w, lam = self._inputs
        if self._transposed is None:
            outputs = [g for g, _ in live]
            seeds = [dot if len(rows) == len(dot) else dot[rows] for _, dot in live]
            try:
                return reverse_products(outputs, w, seeds, columns_at_once)
            except AsymmetricUpdateError:
                self._transposed = Transposed([g for g in self._gradients[: len(w)] if g is not None], w + lam)
        of_live = iter(self._transposed.push([dot[rows] for dot in dots], columns_at_once))
        return [None if g is None else next(of_live) for g in self._gradients[: len(w)]]

    # -- the optimiser ---------------------------------------------------------------------------
    def _through_optimizer(self, g_dots: Tree, state_dots: InnerState, lam_dots: Tree) -> tuple[Tree, Tree]:
        """Tangents of ``(g, w, slots, λ)`` to those of ``(w', slots')``.

        A linear update is its own tangent map. For one column, forward mode is the fastest.
        """
        optimizer = self._optimizer
        at = self._at
        dots = (g_dots, state_dots.w, state_dots.slots, lam_dots)
        if is_linear(optimizer):
            return optimizer.update(*dots[:3], self._lam, at.t + 1)
        columns = dots_of(dots, (self._g(), at.w, at.slots, self._lam))
        if len(columns[0]) == 1:
            single = tree.map(lambda x: x[0] if tree.is_float(x) else x, dots)
            moved = push_forward(optimizer, self._g(), at, self._lam, single)
            return tree.map(lambda x: x.unsqueeze(0) if tree.is_float(x) else x, moved)
        if self._update is None:
            self._update = self._transposed_update(dots)
        numbers = sum(dot[0].numel() for dot in columns)
        return split_state(self._update.push(columns, columns_of_numbers(NUMBERS_PER_ENTRY * numbers)), at)

    def _transposed_update(self, dots: Tree) -> Transposed:
        update, primals, _ = update_of_floats(self._optimizer, self._g(), self._at, self._lam, dots)
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in primals]
            return Transposed(update(*inputs), inputs)

    def _g(self) -> Tree:
        """The gradient, ``None`` where the loss does not reach a weight."""
        of_w = self._gradients[: len(self._inputs[0])]
        return like(self._at.w, [None if g is None else g.detach() for g in of_w])


# -- columns -------------------------------------------------------------------------------------
def _moving(dots: list[Tensor], columns: int) -> Tensor:
    """The numbers of the columns that are not all zero."""
    if not dots:
        return torch.zeros(0, dtype=torch.long)
    return torch.stack([dot.unsqueeze(-1).flatten(1).any(1) for dot in dots]).any(0).nonzero()[:, 0]


def _spread(product: Tensor | None, rows: Tensor, columns: int, like: Tensor) -> Tensor:
    """Products of some columns among zeros for the others."""
    if product is None:
        return like.new_zeros(columns, *like.shape)
    if len(rows) == columns:
        return product
    return like.new_zeros(columns, *like.shape).index_copy(0, rows, product)
