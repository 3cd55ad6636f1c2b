r"""Many tangents through one step: the graph of one gradient is kept, and every column is one reverse product of it.

With :math:`g = \nabla_w L(w, \lambda)`, symmetry of second derivatives makes the tangent of g along
:math:`(\dot w, \dot\lambda)`

.. math::
    \dot g = H \dot w + \frac{\partial^2 L}{\partial w\, \partial\lambda}\, \dot\lambda
           = \nabla_w \left( \nabla_w L \cdot \dot w + \nabla_\lambda L \cdot \dot\lambda \right),

a vector-Jacobian product of :math:`(\nabla_w L, \nabla_\lambda L)`, whose graph all columns share.
Where the update is no gradient (:func:`metaopt.inner.reweighted`), and for a step that is any
function, the graph of the pullback is transposed instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from metaopt import tree
from metaopt.inner._update import split_state, update_of_floats
from metaopt.inner.adjoint import Loss, check_twice_differentiable
from metaopt.inner.reweighted import AsymmetricUpdateError
from metaopt.inner.state import InnerState
from metaopt.optim.optimizer import Optimizer
from metaopt.tree import Tree

# A batched product saves the cost of calls and pays in memory traffic: batches of about this many
# numbers were fastest on a CPU, from a 20,000-weight net (all columns at once, 1.9 times as fast as
# one by one) to convolutions on large batches (one by one).
NUMBERS_IN_A_BATCH = 1 << 22
# What an optimiser's graph saves, for each number that goes into it, about.
NUMBERS_PER_ENTRY = 4


class Tangents(Protocol):
    """Φ at one point, with what its tangents share."""

    @property
    def state(self) -> InnerState:
        """Φ(state, λ; batch), detached."""
        ...

    @property
    def products(self) -> int:
        """Second-order products taken so far."""
        ...

    @property
    def columns_at_once(self) -> int:
        """How many columns to take in one batched product, by the size of the graph. Walks the graph.

        Ask once per run.
        """
        ...

    def push(
        self, state_dots: InnerState, lam_dots: Tree, *, chunk_size: int, bound: float | None = None
    ) -> InnerState:
        """``A·state_dot + B·lam_dot`` for every column; any number of times.

        Args:
            state_dots: floating-point leaves ``[columns, *leaf.shape]``.
            lam_dots: a pytree like λ, with the same leading axis.
            chunk_size: columns per batched product; 1: one product after the other.
            bound: elementwise bound on the tangents of the inner gradient (a biased safeguard), or
                ``None``.
        """
        ...


class InnerTangents:
    """Of optimiser ∘ gradient.

    Columns whose product is known to be zero (no tangent in w, none in the λ of the loss) take
    none.
    """

    __slots__ = ("_at", "_gradients", "_inputs", "_lam", "_optimizer", "_products", "_transposed", "_update")

    def __init__(self, loss: Loss, optimizer: Optimizer, state: InnerState, lam: Tree, batch: Any) -> None:
        """Cost: one gradient with respect to ``(w, λ)``, whose graph is kept."""
        self._at, self._lam, self._optimizer = state, lam, optimizer
        self._products = 0
        self._transposed: Transposed | None = None
        self._update: Transposed | None = None
        with torch.enable_grad():
            w, lam_ = tree.attach(state.w), tree.attach(lam)
            value = loss(w, lam_, batch)
            self._inputs: tuple[list[Tensor], list[Tensor]] = tree.leaves(w), tree.floats(lam_)
            if not value.requires_grad:
                raise ValueError(
                    "inner_loss depends neither on the weights nor on lam, or its graph was cut (detach, no_grad, "
                    ".item(), argmax)"
                )
            gradients = torch.autograd.grad(
                value, self._inputs[0] + self._inputs[1], create_graph=True, allow_unused=True
            )
        self._gradients: list[Tensor | None] = list(gradients)

    @property
    def state(self) -> InnerState:
        """From the gradient that is there already."""
        with torch.no_grad():
            w, slots = self._optimizer.update(self._g(), self._at.w, self._at.slots, self._lam, self._at.t + 1)
        return InnerState(w, slots, self._at.t + 1)

    @property
    def products(self) -> int:
        """Second-order products taken so far."""
        return self._products

    @property
    def columns_at_once(self) -> int:
        """By what the graph of the gradient has saved."""
        return columns_per_batch([g for g in self._gradients if g is not None and g.requires_grad])

    def push(
        self, state_dots: InnerState, lam_dots: Tree, *, chunk_size: int, bound: float | None = None
    ) -> InnerState:
        """The gradient's tangents, then the optimiser's."""
        dots = tree.leaves(state_dots.w) + _dots_of(lam_dots, self._lam)
        g_dots = self._gradient_tangents(dots, chunk_size)
        if bound is not None:
            g_dots = [dot.clamp(-bound, bound) for dot in g_dots]
        g_dots = tree.unflatten(g_dots, tree.flatten(self._at.w)[1])
        return InnerState(*self._through_optimizer((g_dots, state_dots.w, state_dots.slots, lam_dots)), self._at.t + 1)

    # -- parts -----------------------------------------------------------------------------------
    def _g(self) -> Tree:
        flat, spec = tree.flatten(self._at.w)
        return tree.unflatten(
            [torch.zeros_like(x) if g is None else g.detach() for g, x in zip(self._gradients, flat, strict=False)],
            spec,
        )

    def _gradient_tangents(self, dots: list[Tensor], chunk_size: int) -> list[Tensor]:
        w, lam = self._inputs
        first = (
            0 if len(_moving(dots[: len(w)], len(dots[0]))) else len(w)
        )  # weights that stand still need ∇_λ L alone: a graph of first order
        live = [
            (g, dot)
            for g, dot in zip(self._gradients[first:], dots[first:], strict=True)
            if g is not None and g.requires_grad
        ]
        check_twice_differentiable(g for g, _ in live)
        rows = _moving([dot for _, dot in live], len(dots[0]))
        self._products += len(rows)
        products: Sequence[Tensor | None] = [None] * len(w)
        if len(rows):
            outputs, seeds = [g for g, _ in live], [dot if len(rows) == len(dot) else dot[rows] for _, dot in live]
            try:
                if self._transposed is None:
                    products = reverse_products(outputs, w, seeds, chunk_size)
            except AsymmetricUpdateError:
                self._transposed = Transposed([g for g in self._gradients[: len(w)] if g is not None], w + lam)
            if self._transposed is not None:
                of_live = iter(self._transposed.push([dot[rows] for dot in dots], chunk_size))
                products = [None if g is None else next(of_live) for g in self._gradients[: len(w)]]
        return [_spread(product, rows, len(dots[0]), x) for product, x in zip(products, w, strict=True)]

    def _through_optimizer(self, dots: tuple[Tree, Tree, Tree, Tree]) -> tuple[Tree, Tree]:
        """Tangents of ``(g, w, slots, λ)`` to those of ``(w', slots')``.

        An update that is linear is its own tangent map.
        """
        optimizer, at = self._optimizer, self._at
        if not optimizer.reads_lam and type(optimizer).transpose_leaf is not Optimizer.transpose_leaf:
            return optimizer.update(*dots[:3], self._lam, at.t + 1)
        if self._update is None:
            update, primals, _ = update_of_floats(optimizer, self._g(), at, self._lam, dots)
            with torch.enable_grad():
                inputs = [x.detach().requires_grad_() for x in primals]
                self._update = Transposed(update(*inputs), inputs)
        columns = [
            dot
            for dot, x in zip(tree.leaves(dots), tree.leaves((at.w, at.w, at.slots, self._lam)), strict=True)
            if tree.is_float(x)
        ]
        return split_state(
            self._update.push(columns, _columns_of_numbers(NUMBERS_PER_ENTRY * sum(dot[0].numel() for dot in columns))),
            at,
        )


class Transposed:
    """The tangent map of ``outputs`` from their graph.

    The pullback is linear in its seeds, and its transpose is the tangent map.
    """

    __slots__ = ("_bars", "_outputs", "_seeds")

    def __init__(self, outputs: list[Tensor], inputs: list[Tensor]) -> None:
        """Cost: one backward pass, whose graph is kept."""
        self._outputs, live = outputs, [x for x in outputs if x.requires_grad]
        with torch.enable_grad():
            self._seeds = [torch.zeros_like(x).requires_grad_() for x in live]
            bars = (
                torch.autograd.grad(live, inputs, self._seeds, create_graph=True, allow_unused=True)
                if live
                else [None] * len(inputs)
            )
        check_twice_differentiable(bars)
        self._bars: list[Tensor | None] = list(bars)

    @property
    def columns_at_once(self) -> int:
        """By what the graph has saved."""
        return columns_per_batch([bar for bar in self._bars if bar is not None and bar.requires_grad])

    def push(self, dots: list[Tensor], chunk_size: int) -> list[Tensor]:
        """One product per column; ``dots`` like the inputs, the result like the outputs."""
        columns = len(dots[0])
        live = [(bar, dot) for bar, dot in zip(self._bars, dots, strict=True) if bar is not None and bar.requires_grad]
        products: Sequence[Tensor | None] = [None] * len(self._seeds)
        if live and self._seeds:
            products = reverse_products([bar for bar, _ in live], self._seeds, [dot for _, dot in live], chunk_size)
        of_live = iter(products)
        tangents = [next(of_live) if x.requires_grad else None for x in self._outputs]
        return [
            x.new_zeros(columns, *x.shape) if tangent is None else tangent
            for tangent, x in zip(tangents, self._outputs, strict=True)
        ]


class FunctionTangents:
    """Of any function of ``(state, λ)``, given its inputs and outputs with the graph between them."""

    __slots__ = ("_lam", "_new", "_old", "_products", "_transposed")

    def __init__(self, old: InnerState, lam: Tree, new: InnerState) -> None:
        """Cost: one backward pass, whose graph is kept."""
        self._old, self._lam, self._new, self._products = old, lam, new, 0
        self._transposed = Transposed(tree.floats(new), tree.floats(old) + tree.floats(lam))

    @property
    def state(self) -> InnerState:
        """The output, detached."""
        return tree.detach(self._new)

    @property
    def products(self) -> int:
        """One per column."""
        return self._products

    @property
    def columns_at_once(self) -> int:
        """By what the graph of the pullback has saved."""
        return self._transposed.columns_at_once

    def push(
        self, state_dots: InnerState, lam_dots: Tree, *, chunk_size: int, bound: float | None = None
    ) -> InnerState:
        """As :meth:`Tangents.push`.

        Raises:
            ValueError: if a bound is given: there is no inner gradient here.
        """
        if bound is not None:
            raise ValueError(
                "a custom step has no inner gradient whose tangents could be bounded: bound them inside the step, or "
                "build it with inner_step"
            )
        dots = _dots_of(state_dots, self._old) + _dots_of(lam_dots, self._lam)
        self._products += len(dots[0])
        tangents = iter(self._transposed.push(dots, chunk_size))
        return tree.map(lambda x: next(tangents) if tree.is_float(x) else x, self._new)


# -- products ------------------------------------------------------------------------------------
def reverse_products(
    outputs: list[Tensor], inputs: list[Tensor], seeds: list[Tensor], chunk_size: int
) -> list[Tensor | None]:
    """``Σ seedᵀ ∂output/∂input`` for every column of the seeds, ``[columns, *input.shape]``; ``None`` is zero.

    Raises:
        RuntimeError: if an operation has no second derivative, or cannot be batched.
    """
    columns, chunks = len(seeds[0]), []
    for first in range(0, columns, chunk_size):
        part = [seed[first : first + chunk_size] for seed in seeds]
        chunks.append(_one_by_one(outputs, inputs, part) if chunk_size == 1 else _at_once(outputs, inputs, part))
    if len(chunks) == 1:
        return list(chunks[0])
    return [None if parts[0] is None else torch.cat(parts) for parts in zip(*chunks, strict=True)]


def _one_by_one(outputs: list[Tensor], inputs: list[Tensor], seeds: list[Tensor]) -> list[Tensor | None]:
    products = torch.autograd.grad(outputs, inputs, [seed[0] for seed in seeds], retain_graph=True, allow_unused=True)
    return [None if product is None else product[None] for product in products]


def _at_once(outputs: list[Tensor], inputs: list[Tensor], seeds: list[Tensor]) -> Sequence[Tensor | None]:
    try:
        return torch.autograd.grad(outputs, inputs, seeds, retain_graph=True, allow_unused=True, is_grads_batched=True)
    except AsymmetricUpdateError:
        raise
    except RuntimeError as error:
        first_line = str(error).split("\n")[0]
        raise RuntimeError(
            f"the batched second-order products failed ({first_line}); chunk_size=1 takes them one by one"
        ) from error


def columns_per_batch(outputs: list[Tensor]) -> int:
    """How many columns of products of this graph make a batch of about :data:`NUMBERS_IN_A_BATCH` numbers (at least 1)."""
    return _columns_of_numbers(numbers_saved(outputs))


def _columns_of_numbers(numbers: int) -> int:
    return max(1, NUMBERS_IN_A_BATCH // max(1, numbers))


def numbers_saved(outputs: list[Tensor]) -> int:
    """How many numbers the graph behind some tensors has saved: what one product reads."""
    seen: set[Any] = set()
    waiting: list[Any] = [x.grad_fn for x in outputs]
    names: dict[type, list[str]] = {}
    total = 0
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        saved = names.setdefault(type(node), [name for name in dir(type(node)) if name.startswith("_saved_")])
        total += sum(x.numel() for name in saved if isinstance(x := getattr(node, name), Tensor))
        waiting.extend(parent for parent, _ in node.next_functions)
    return total


# -- columns -------------------------------------------------------------------------------------
def _dots_of(dots: Tree, like: Tree) -> list[Tensor]:
    return [dot for dot, x in zip(tree.leaves(dots), tree.leaves(like), strict=True) if tree.is_float(x)]


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
