"""Tangent maps from a graph: a pullback is linear in its seeds, and its transpose is the tangent map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metaopt import tree
from metaopt.inner._graph import can_be_batched, numbers_saved
from metaopt.inner.reweighted import AsymmetricUpdateError
from metaopt.tree import Tree

# A batched product saves calls and costs memory traffic. Batches of about this many numbers were the
# fastest on a CPU: for a net of 20,000 weights that is all columns at once (1.9 times as fast as one
# by one), for convolutions on large batches one by one.
NUMBERS_IN_A_BATCH = 1 << 22


class Transposed:
    """The tangent map of ``outputs`` as functions of ``inputs``."""

    __slots__ = ("_bars", "_batched", "_outputs", "_seeds")

    def __init__(self, outputs: list[Tensor], inputs: list[Tensor]) -> None:
        """Cost: one backward pass, whose graph is kept."""
        live = [x for x in outputs if x.requires_grad]
        bars: Sequence[Tensor | None] = [None] * len(inputs)
        with torch.enable_grad():
            self._seeds = [torch.zeros_like(x).requires_grad_() for x in live]
            if live:
                bars = torch.autograd.grad(live, inputs, self._seeds, create_graph=True, allow_unused=True)
        self._batched = can_be_batched(bars)
        self._outputs = outputs
        self._bars = bars

    @property
    def columns_at_once(self) -> int:
        """How many columns to take at once, by what the graph has saved."""
        return columns_per_batch([bar for bar in self._bars if bar is not None and bar.requires_grad])

    def push(self, dots: list[Tensor], columns_at_once: int) -> list[Tensor]:
        """One product per column; ``dots`` like the inputs, the result like the outputs."""
        columns = len(dots[0])
        live = [(bar, dot) for bar, dot in zip(self._bars, dots, strict=True) if bar is not None and bar.requires_grad]
        products: Sequence[Tensor | None] = [None] * len(self._seeds)
        if live and self._seeds:
            bars = [bar for bar, _ in live]
            seeds = [dot for _, dot in live]
            at_once = columns_at_once if self._batched else 1
            products = reverse_products(bars, self._seeds, seeds, at_once)
        of_live = iter(products)
        tangents = [next(of_live) if x.requires_grad else None for x in self._outputs]
        return [
            x.new_zeros(columns, *x.shape) if tangent is None else tangent
            for tangent, x in zip(tangents, self._outputs, strict=True)
        ]


def reverse_products(
    outputs: list[Tensor], inputs: list[Tensor], seeds: list[Tensor], columns_at_once: int
) -> list[Tensor | None]:
    """``Σ seedᵀ ∂output/∂input`` for every column of the seeds, ``[columns, *input.shape]``.

    ``None`` is zero.

    Raises:
        RuntimeError: if an operation has no second derivative, or cannot be batched.
    """
    chunks: list[Sequence[Tensor | None]] = []
    for first in range(0, len(seeds[0]), columns_at_once):
        part = [seed[first : first + columns_at_once] for seed in seeds]
        products = _one_by_one if columns_at_once == 1 else _at_once
        chunks.append(products(outputs, inputs, part))
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
            f"the batched second-order products failed ({first_line}); columns_at_once=1 takes them one by one"
        ) from error


def columns_per_batch(outputs: list[Tensor]) -> int:
    """How many columns of products of this graph make a batch of :data:`NUMBERS_IN_A_BATCH` numbers."""
    return columns_of_numbers(numbers_saved(outputs))


def columns_of_numbers(numbers: int) -> int:
    """How many columns of this many numbers make a batch."""
    return max(1, NUMBERS_IN_A_BATCH // max(1, numbers))


def dots_of(dots: Tree, like: Tree) -> list[Tensor]:
    """The leaves of tangents where ``like`` has floating-point ones."""
    return [dot for dot, x in zip(tree.leaves(dots), tree.leaves(like), strict=True) if tree.is_float(x)]
