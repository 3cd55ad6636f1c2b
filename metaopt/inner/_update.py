"""Derivatives of an optimiser's update, written once for all optimisers: its pullback and its pushforward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metaopt import tree
from metaopt.inner import _engine
from metaopt.optim.optimizer import Optimizer, Slots, by_slot
from metaopt.tree import Tree


def pull_back(
    optimizer: Optimizer, g: Tree, state: Any, lam: Tree, cotangent: Any, wrt: str
) -> tuple[list[Tensor], list[Tensor | None], Tree, Tree]:
    """Cotangents of ``(g, w, slots, λ)`` from one of ``(w', slots')``; the first two as leaves.

    A part that ``wrt`` leaves out is empty or ``None``. The cotangent of a missing gradient is zero.
    ``cotangent.slots`` may be ``None``, which stands for zero. ``g`` may carry a graph, which is not
    used.

    Cost: element-wise work, without an evaluation of the loss.
    """
    if is_linear(optimizer) and not any([x is None for x in tree.leaves(g)]):
        return _pull_back_linear(optimizer, state, lam, cotangent, wrt)
    with torch.enable_grad():
        g_, g_floats = tree.attached(g)
        w = state.w
        w_floats = []
        slots = state.slots
        slot_floats = []
        if wrt != "lam":
            w, w_floats = tree.attached(w)
            slots, slot_floats = tree.attached(slots)
        lam_floats: list[Tensor] = []
        if wrt != "state" and optimizer.reads_lam:
            lam, lam_floats = tree.attached(lam)
        w_new, slots_new = optimizer.update(g_, w, slots, lam, state.t + 1)
        outputs = tree.leaves(w_new)
        seeds = tree.leaves(cotangent.w)
        if cotangent.slots is not None:
            outputs = outputs + tree.leaves(slots_new)
            seeds = seeds + tree.leaves(cotangent.slots)
        live = [(o, s) for o, s in zip(outputs, seeds, strict=True) if isinstance(o, Tensor) and o.requires_grad]
    inputs = [*g_floats, *w_floats, *slot_floats, *lam_floats]
    bars: Any = [None] * len(inputs)
    if live:
        bars = _engine.products([o for o, _ in live], inputs, [s for _, s in live])
    supply = iter(bars)
    g_bars = [_or_zeros(next(supply), x) for x in g_floats]
    w_bar = [next(supply) for _ in w_floats]
    slot_bars = [_or_zeros(next(supply), x) for x in slot_floats]
    lam_bar = _into_floats(supply, lam) if lam_floats else None
    return (
        _among_zeros(g_bars, g, state.w),
        w_bar,
        _into_floats(slot_bars, state.slots) if wrt != "lam" else None,
        lam_bar,
    )


def is_linear(optimizer: Optimizer) -> bool:
    """Whether the update is linear in gradient, weights and slots, with its transpose written out."""
    written_out = type(optimizer).transpose_leaf is not Optimizer.transpose_leaf
    return written_out and not optimizer.reads_lam and not optimizer.counts_steps


def _or_zeros(bar: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if bar is None else bar


def _among_zeros(g_bars: list[Tensor], g: Tree, w: Tree) -> list[Tensor]:
    """Cotangents of the gradients that are there, and zeros for the others."""
    supply = iter(g_bars)
    pairs = zip(tree.leaves(g), tree.leaves(w), strict=True)
    return [torch.zeros_like(x_w) if x_g is None else next(supply) for x_g, x_w in pairs]


def _pull_back_linear(
    optimizer: Optimizer, state: Any, lam: Tree, cotangent: Any, wrt: str
) -> tuple[list[Tensor], list[Tensor | None], Tree, None]:
    """:func:`pull_back` by the transpose that the optimiser has written out."""
    w_bars, spec = tree.flatten(cotangent.w)
    slots_bars = None if cotangent.slots is None else {name: tree.leaves(bar) for name, bar in cotangent.slots.items()}
    u: list[Tensor] = []
    w: list[Tensor | None] = []
    slots: list[Slots] = []
    for i, (w_bar, hyper) in enumerate(zip(w_bars, optimizer.hyper_leaves(lam, state.t + 1, spec), strict=True)):
        slots_bar = None if slots_bars is None else {name: bar[i] for name, bar in slots_bars.items()}
        bars = optimizer.transpose_leaf(w_bar, slots_bar, hyper, state.t + 1)
        assert bars is not None  # an optimiser that overrides it answers for every leaf
        u.append(bars[0])
        w.append(bars[1])
        slots.append(bars[2])
    return (u, [], None, None) if wrt == "lam" else (u, w, by_slot(slots, spec), None)


def push_forward(optimizer: Optimizer, g: Tree, state: Any, lam: Tree, dots: Tree) -> tuple[Tree, Tree]:
    """The tangent of ``(w', slots')`` for tangents ``dots`` of ``(g, w, slots, λ)``, in forward mode."""
    update, primals, flat_dots = update_of_floats(optimizer, g, state, lam, dots)
    primals = [x.contiguous() for x in primals]  # an expanded tensor cannot be made dual
    return split_state(torch.func.jvp(update, tuple(primals), tuple(flat_dots))[1], state)


def update_of_floats(
    optimizer: Optimizer, g: Tree, state: Any, lam: Tree, tangent: Tree
) -> tuple[Callable[..., list[Tensor]], list[Tensor], list[Tensor]]:
    """The update as a function of its floating-point leaves, those leaves, and the leaves of a tangent."""
    flat, spec = tree.flatten((g, state.w, state.slots, lam))
    where = [i for i, leaf in enumerate(flat) if tree.is_float(leaf)]
    flat_tangent = tree.leaves(tangent)

    def update(*float_leaves: Tensor) -> list[Tensor]:
        full = list(flat)
        for i, leaf in zip(where, float_leaves, strict=True):
            full[i] = leaf
        g_, w, slots, lam_ = tree.unflatten(full, spec)
        return tree.floats(optimizer.update(g_, w, slots, lam_, state.t + 1))

    return update, [flat[i] for i in where], [flat_tangent[i] for i in where]


def split_state(floats: list[Tensor], state: Any) -> tuple[Tree, Tree]:
    """The floating-point leaves of ``(w, slots)`` back in their places."""
    n_w = len(tree.floats(state.w))
    return _into_floats(floats[:n_w], state.w), _into_floats(floats[n_w:], state.slots)


def _into_floats(values: Any, like: Tree) -> Tree:
    """``values`` in the places of the floating-point leaves of ``like``; other leaves stay."""
    flat, spec = tree.flatten(like)
    supply = iter(values)
    return tree.unflatten([next(supply) if tree.is_float(leaf) else leaf for leaf in flat], spec)
