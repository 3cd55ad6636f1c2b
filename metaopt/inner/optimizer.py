"""What every inner optimiser is: a pure, element-wise map ``(g, w, slots, hyperparameters) -> (w', slots')``.

One optimiser is one file with one frozen dataclass that says which fields are hyperparameters and how *one tensor* is updated
(:meth:`Optimizer.update_leaf`). Everything else is written here, once for all of them: hyperparameters that are floats, tensors,
pytrees or functions of λ; the loop over leaves; the pullback and the pushforward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from metaopt import tree
from metaopt.inner import _engine
from metaopt.tree import Tree

Hyper: TypeAlias = float | Tensor | Tree | Callable[[Tree, int], Any]
"""A hyperparameter: a float, a tensor, a pytree like ``w`` (element-wise), or ``(lam, t) -> any of these`` with t = 1 … T."""

Slots: TypeAlias = dict[str, Tensor]


class Optimizer:
    """Base of all inner optimisers; a subclass is a frozen dataclass.

    Attributes:
        hypers: names of the fields that are hyperparameters; a field may hold a tuple of them (Adam's ``betas``).
    """

    hypers: ClassVar[tuple[str, ...]] = ("lr",)

    # -- to be written by each optimiser ---------------------------------------------------------
    def init_leaf(self, w: Tensor) -> Slots:
        """The slots of one tensor before the first step."""
        raise NotImplementedError

    def update_leaf(self, g: Tensor, w: Tensor, slots: Slots, hyper: dict[str, Any], t: int) -> tuple[Tensor, Slots]:
        """One tensor's update at step ``t`` (1 … T): new tensor, new slots. Pure, out of place, differentiable in everything."""
        raise NotImplementedError

    def transpose_leaf(self, w_bar: Tensor, slots_bar: Slots | None, hyper: dict[str, Any], t: int) -> tuple[Tensor, Tensor, Slots] | None:
        """Cotangents of ``(g, w, slots)`` of one tensor, where the update is linear in them; ``None`` (the default): by autograd.

        A shortcut for small problems, in which autograd's own cost shows; ``slots_bar`` may be ``None`` (zero).
        """
        return None

    # -- written once ----------------------------------------------------------------------------
    def init(self, w: Tree) -> Tree:
        """Slots for all weights: slot name to a pytree like ``w``."""
        flat, spec = tree.flatten(w)
        per_leaf = [self.init_leaf(leaf) for leaf in flat]
        return _transpose(per_leaf, spec)

    def update(self, g: Tree, w: Tree, slots: Tree, lam: Tree, t: int) -> tuple[Tree, Tree]:
        """The update of all weights: ``(w', slots')``.

        Args:
            g: gradient of the inner loss, a pytree like ``w``.
            w: weights.
            slots: what :meth:`init` or the last update returned.
            lam: hyperparameters, handed to the fields that are callables.
            t: number of this step, 1 … T.
        """
        flat_w, spec = tree.flatten(w)
        flat_g = tree.leaves(g)
        flat_slots = {name: tree.leaves(slot) for name, slot in slots.items()}
        new_w, new_slots = [], []
        for i, (g_i, w_i, hyper_i) in enumerate(zip(flat_g, flat_w, self.hyper_leaves(lam, t, spec), strict=True)):
            slots_i = {name: slot[i] for name, slot in flat_slots.items()}
            w_new, slots_new = self.update_leaf(g_i, w_i, slots_i, hyper_i, t)
            new_w.append(w_new)
            new_slots.append(slots_new)
        return tree.unflatten(new_w, spec), _transpose(new_slots, spec)

    def hyper_leaves(self, lam: Tree, t: int, spec: tree.Spec) -> list[dict[str, Any]]:
        """The hyperparameters of step ``t``, name to value, for each weight leaf."""
        values = {name: getattr(self, name) for name in self.hypers}
        if all([isinstance(value, (int, float)) for value in values.values()]):
            return [values] * spec.num_leaves
        leaves = [per_leaf(value, lam, t, spec, name) for name, value in values.items()]
        return [dict(zip(values, of_one, strict=True)) for of_one in zip(*leaves, strict=True)]

    @property
    def steps_taken(self) -> int:
        """Steps taken before the first one here."""
        return 0

    @property
    def elementwise(self) -> bool:
        """Whether each number's update depends on its own gradient alone, so that a stacked meta-batch needs no ``PerTask``."""
        return True

    @property
    def reads_lam(self) -> bool:
        """Whether λ enters the update directly, through a callable hyperparameter."""
        return any([_is_callable(getattr(self, name)) for name in self.hypers])


def per_leaf(value: Hyper, lam: Tree, t: int, spec: tree.Spec, name: str) -> list[Any]:
    """A hyperparameter as one value per weight leaf (floats stay floats; a tuple gives a tuple per leaf).

    Raises:
        ValueError: if a pytree does not have the structure of the weights.
    """
    if callable(value):
        value = value(lam, t)
    if value is None or isinstance(value, (int, float, Tensor)):
        return [value] * spec.num_leaves
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return list(zip(*(per_leaf(entry, lam, t, spec, name) for entry in value), strict=True))
    flat, value_spec = tree.flatten(value)
    if value_spec != spec:
        raise ValueError(f"{name} is a pytree, but not like the weights: its leaves are {tree.names(value)}, {len(flat)} against {spec.num_leaves}")
    return flat


def _is_callable(value: Any) -> bool:
    return callable(value) or (isinstance(value, tuple) and any(_is_callable(entry) for entry in value))


def _transpose(per_leaf_slots: list[Slots], spec: tree.Spec) -> Tree:
    """List of ``{slot: tensor}`` to ``{slot: pytree like w}``."""
    slot_names = per_leaf_slots[0] if per_leaf_slots else {}
    return {name: tree.unflatten([slots[name] for slots in per_leaf_slots], spec) for name in slot_names}


# -- derivatives of the update, for every optimiser --------------------------------------------------
def pull_back(optimizer: Optimizer, g: Tree, state: Any, lam: Tree, cotangent: Any, wrt: str) -> tuple[list[Tensor], list[Tensor | None], Tree, Tree]:
    """Cotangent of ``(w', slots')`` to cotangents of ``(g, w, slots, λ)``, the first two as leaves; what ``wrt`` leaves out is empty or ``None``.

    Element-wise work only; no evaluation of the loss. ``cotangent.slots`` may be ``None`` (zero), and ``g`` may carry a graph, which is left alone.
    """
    if not optimizer.reads_lam and type(optimizer).transpose_leaf is not Optimizer.transpose_leaf:
        return _pull_back_linear(optimizer, state, lam, cotangent, wrt)
    with torch.enable_grad():
        g_, w, slots = tree.attach(g), state.w, state.slots
        inputs = tree.leaves(g_)
        n_g, n_w, n_slots = len(inputs), 0, 0
        if wrt != "lam":
            w, slots = tree.attach(w), tree.attach(slots)
            w_floats, slot_floats = tree.leaves(w), tree.floats(slots)
            n_w, n_slots = len(w_floats), len(slot_floats)
            inputs = inputs + w_floats + slot_floats
        lam_floats: list[Tensor] = []
        if wrt != "state" and optimizer.reads_lam:
            lam = tree.attach(lam)
            lam_floats = tree.floats(lam)
            inputs = inputs + lam_floats
        w_new, slots_new = optimizer.update(g_, w, slots, lam, state.t + 1)
        outputs, seeds = tree.leaves(w_new), tree.leaves(cotangent.w)
        if cotangent.slots is not None:
            outputs, seeds = outputs + tree.leaves(slots_new), seeds + tree.leaves(cotangent.slots)
        live = [(o, s) for o, s in zip(outputs, seeds, strict=True) if isinstance(o, Tensor) and o.requires_grad]
    bars: Any = [None] * len(inputs)
    if live:
        bars = _engine.products([o for o, _ in live], inputs, [s for _, s in live])
    u = [torch.zeros_like(x) if b is None else b for b, x in zip(bars[:n_g], inputs[:n_g], strict=True)]
    w_bar = list(bars[n_g : n_g + n_w])
    slot_bars = zip(bars[n_g + n_w : n_g + n_w + n_slots], inputs[n_g + n_w :], strict=False)
    slots_bar = _into_floats([torch.zeros_like(x) if b is None else b for b, x in slot_bars], state.slots) if wrt != "lam" else None
    lam_bar = _into_floats(bars[n_g + n_w + n_slots :], lam) if lam_floats else None
    return u, w_bar, slots_bar, lam_bar


def _pull_back_linear(optimizer: Optimizer, state: Any, lam: Tree, cotangent: Any, wrt: str) -> tuple[list[Tensor], list[Tensor | None], Tree, None]:
    """:func:`pull_back` from :meth:`Optimizer.transpose_leaf`."""
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
    return (u, [], None, None) if wrt == "lam" else (u, w, _transpose(slots, spec), None)


def push_forward(optimizer: Optimizer, g: Tree, state: Any, lam: Tree, g_dot: Tree, state_dot: Any, lam_dot: Tree) -> tuple[Tree, Tree]:
    """Tangents of ``(g, w, slots, λ)`` to the tangent of ``(w', slots')``, in forward mode."""
    update, primals, dots = update_of_floats(optimizer, g, state, lam, (g_dot, state_dot.w, state_dot.slots, lam_dot))
    return split_state(torch.func.jvp(update, tuple(primals), tuple(dots))[1], state)


def update_of_floats(
    optimizer: Optimizer, g: Tree, state: Any, lam: Tree, tangent: Tree
) -> tuple[Callable[..., list[Tensor]], list[Tensor], list[Tensor]]:
    """The update as a function of its floating-point leaves alone, these leaves, and those of a tangent of ``(g, w, slots, λ)``."""
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
