"""What every inner optimiser is: a pure, element-wise map ``(g, w, slots, hyperparameters) -> (w', slots')``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, ClassVar, TypeAlias

from torch import Tensor

from metaopt import checks, tree
from metaopt.tree import Tree

Hyper: TypeAlias = float | Tensor | Tree | Callable[[Tree, int], Any]
"""A hyperparameter.

A float, a tensor, a pytree like ``w`` (element-wise), a dictionary of glob patterns of weights' names
(per layer), or ``(lam, t) -> any of these`` with t = 1 … T.
"""

Slots: TypeAlias = dict[str, Tensor]

Check: TypeAlias = Callable[[object, str, Any], None]
"""Raises an error that names the owner, the field and the value; see :mod:`metaopt.checks`."""

USUAL_RANGES: Mapping[str, Check] = {
    "lr": checks.non_negative,
    "weight_decay": checks.non_negative,
    "eps": checks.non_negative,
    "momentum": checks.unit_interval,
    "betas": partial(checks.unit_interval, closed="left"),
    "nesterov": checks.flag,
    "amsgrad": checks.flag,
    "decoupled_weight_decay": checks.flag,
}
"""What most optimisers mean by a name, and what it may be."""


class Optimizer:
    """Base of all inner optimisers; a subclass is a frozen dataclass.

    A subclass says which of its fields are hyperparameters, and how *one tensor* is updated
    (:meth:`Optimizer.update_leaf`). Everything else is written once for all of them:
    hyperparameters that are floats, tensors, pytrees or functions of λ; the loop over leaves; the
    pullback and the pushforward.

    Attributes:
        hypers: names of the fields that are hyperparameters; a field may hold a tuple of them
            (Adam's ``betas``).
        ranges: what the fields may be, where :data:`USUAL_RANGES` does not say it.
        pairs: the fields that hold two hyperparameters.
    """

    decoupled: ClassVar[bool] = False
    hypers: ClassVar[tuple[str, ...]] = ("lr",)
    ranges: ClassVar[Mapping[str, Check]] = {}
    pairs: ClassVar[tuple[str, ...]] = ("betas",)

    def __post_init__(self) -> None:
        """Refuse settings that are out of range.

        Raises:
            ValueError: for a number out of its range.
            TypeError: for something that is not a number and cannot give one.
        """
        ranges = {**USUAL_RANGES, **self.ranges}
        for field in fields(self):  # pyright: ignore[reportArgumentType]  (every subclass is a dataclass)
            check = ranges.get(field.name)
            if check is None:
                continue
            setting = getattr(self, field.name)
            entries = [setting]
            if field.name in self.pairs:
                checks.pair(self, field.name, setting)
                entries = [setting] if callable(setting) else setting
            for entry in entries:
                check(self, field.name, entry)

    @property
    def parts(self) -> list[Optimizer]:
        """The optimisers inside this one."""
        return []

    @property
    def loss_decay(self) -> Hyper:
        """Weight decay that acts as ``½ · decay · ‖w‖²`` in the loss, for implicit differentiation.

        Raises:
            ValueError: for decoupled weight decay, which shifts the fixed points to those of no loss.
        """
        decay = getattr(self, "weight_decay", 0.0)
        if not is_zero(decay) and (self.decoupled or getattr(self, "decoupled_weight_decay", False)):
            raise ValueError(
                f"{type(self).__name__} takes its weight decay off the weights, so that its fixed points are not those "
                "of the inner loss, and implicit differentiation does not hold there: put the decay into inner_loss, "
                "and set weight_decay=0"
            )
        return decay

    @property
    def counts_steps(self) -> bool:
        """Whether an update depends on how many steps a weight has taken.

        Then the slot ``missed`` counts, for each weight, the steps in which it had no gradient.
        """
        return False

    # -- to be written by each optimiser ---------------------------------------------------------
    def init_leaf(self, w: Tensor) -> Slots:
        """The slots of one tensor before the first step."""
        raise NotImplementedError

    def update_leaf(self, g: Tensor, w: Tensor, slots: Slots, hyper: dict[str, Any], t: int) -> tuple[Tensor, Slots]:
        """One tensor's update: new tensor, new slots. ``t`` is the number of this tensor's step, 1 … T.

        Pure, out of place, differentiable in everything.
        """
        raise NotImplementedError

    def transpose_leaf(
        self, w_bar: Tensor, slots_bar: Slots | None, hyper: dict[str, Any], t: int
    ) -> tuple[Tensor, Tensor, Slots] | None:
        """Cotangents of ``(g, w, slots)`` of one tensor, where the update is linear in them.

        A shortcut for small problems, in which the cost of autograd itself shows. With ``None``, the
        default, autograd is used. ``slots_bar`` may be ``None``, which stands for zero.
        """
        return None

    # -- written once ----------------------------------------------------------------------------
    def init(self, w: Tree) -> Tree:
        """Slots for all weights: slot name to a pytree like ``w``."""
        flat, spec = tree.flatten(w)
        slots = by_slot([self.init_leaf(leaf) for leaf in flat], spec)
        if self.counts_steps:
            slots["missed"] = tree.unflatten([0] * len(flat), spec)
        return slots

    def update(self, g: Tree, w: Tree, slots: Tree, lam: Tree, t: int) -> tuple[Tree, Tree]:
        """The update of all weights: ``(w', slots')``.

        As in ``torch.optim``, a weight without a gradient stays, with its slots, and its steps are
        counted without this one.

        Args:
            g: gradient of the inner loss, a pytree like ``w``; ``None`` where the loss does not
                reach a weight.
            w: weights.
            slots: what :meth:`init` or the last update returned.
            lam: hyperparameters, handed to the fields that are callables.
            t: number of this step, 1 … T.
        """
        flat_w, spec = tree.flatten(w)
        flat_g = tree.leaves(g)
        flat_slots = {name: tree.leaves(slot) for name, slot in slots.items()}
        missed = flat_slots.pop("missed", None)
        new_w: list[Tensor] = []
        new_slots: list[Slots] = []
        for i, (g_i, w_i, hyper_i) in enumerate(zip(flat_g, flat_w, self.hyper_leaves(lam, t, spec), strict=True)):
            slots_i = {name: slot[i] for name, slot in flat_slots.items()}
            if g_i is None:
                new_w.append(w_i)
                new_slots.append(slots_i)
                continue
            own_t = t if missed is None else t - missed[i]
            w_new, slots_new = self.update_leaf(g_i, w_i, slots_i, hyper_i, own_t)
            if w_new.dtype != w_i.dtype or w_new.shape != w_i.shape:
                raise ValueError(_changed(self, w_i, w_new, i, spec))
            new_w.append(w_new)
            new_slots.append(slots_new)
        after = by_slot(new_slots, spec)
        if missed is not None:
            after["missed"] = tree.unflatten(later(missed, flat_g), spec)
        return tree.unflatten(new_w, spec), after

    def hyper_leaves(self, lam: Tree, t: int, spec: tree.Spec) -> list[dict[str, Any]]:
        """The hyperparameters of step ``t``, name to value, for each weight leaf."""
        values = {name: getattr(self, name) for name in self.hypers}
        if all([isinstance(value, (int, float)) for value in values.values()]):
            return [values] * spec.num_leaves
        found: list[dict[str, Any]] = [{} for _ in range(spec.num_leaves)]
        for name, value in values.items():
            leaves = per_leaf(value, lam, t, spec, name, pair=name in self.pairs)
            for of_one, leaf in zip(found, leaves, strict=True):
                of_one[name] = leaf
        return found

    @property
    def steps_taken(self) -> int:
        """Steps taken before the first one here."""
        return 0

    @property
    def elementwise(self) -> bool:
        """Whether each number's update depends on the gradient of that number alone.

        If not, stacked tasks need :class:`metaopt.optim.PerTask`.
        """
        return True

    @property
    def reads_lam(self) -> bool:
        """Whether λ enters the update directly, through a callable hyperparameter."""
        return any([_is_callable(getattr(self, name)) for name in self.hypers])


def later(missed: list[int], flat_g: list[Tensor | None]) -> list[int]:
    """The steps that each weight has missed, after one more."""
    return [count + 1 if g is None else count for count, g in zip(missed, flat_g, strict=True)]


def _changed(optimizer: Optimizer, before: Tensor, after: Tensor, number: int, spec: tree.Spec) -> str:
    """What to say of an update that does not give the weight's own dtype and shape."""
    return (
        f"{type(optimizer).__name__} would turn the weight {tree.names(spec.like)[number]} from {before.dtype} "
        f"{tuple(before.shape)} into {after.dtype} {tuple(after.shape)}: a tensor of hyperparameters has another dtype "
        "or shape than the weight; give it the weight's, for instance with .to(w.dtype)"
    )


def per_leaf(value: Any, lam: Tree, t: int, spec: tree.Spec, name: str, *, pair: bool = False) -> list[Any]:
    """A hyperparameter as one value per weight leaf; numbers stay numbers.

    Args:
        value: the hyperparameter.
        lam: handed to it where it is a function.
        t: number of the step.
        spec: the structure of the weights.
        name: for the error's text.
        pair: whether it holds two hyperparameters; a leaf then gets a pair.

    Raises:
        ValueError: if a pytree has neither the structure of the weights nor patterns of their names.
    """
    if callable(value):
        value = value(lam, t)
    if pair:
        first, second = (per_leaf(entry, lam, t, spec, name) for entry in value)
        return list(zip(first, second, strict=True))
    if isinstance(value, Tensor) and value.ndim:
        _check_fits(value, spec, name)
    if value is None or isinstance(value, (int, float, Tensor)):
        return [value] * spec.num_leaves
    try:
        return tree.leaves_like(value, spec)
    except ValueError as error:
        if isinstance(value, Mapping) and all([isinstance(key, str) for key in value]):
            return per_layer(value, spec, name)
        raise ValueError(f"{name} is a pytree, but not like the weights: {error}") from None


def _check_fits(value: Tensor, spec: tree.Spec, name: str) -> None:
    """One tensor for all weights must broadcast to each of them."""
    for i, leaf in enumerate(tree.leaves(spec.like)):
        if not _broadcasts(value.shape, leaf.shape):
            weight = tree.names(spec.like)[i]
            raise ValueError(
                f"{name} is one tensor of shape {tuple(value.shape)}, which does not fit the weight {weight} of shape "
                f"{tuple(leaf.shape)}: give one number, a pytree like the weights, patterns of their names, or a value "
                "per step with mo.by(..., per_step=True)"
            )


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    if len(shape) > len(to):
        return False
    last = to[len(to) - len(shape) :]
    return all([n in (1, m) for n, m in zip(shape, last, strict=True)])


def per_layer(values: Mapping[str, Any], spec: tree.Spec, name: str) -> list[Any]:
    """A value for each weight leaf from values by glob patterns of their names.

    The first that matches counts.

    Raises:
        ValueError: if a weight matches no pattern, or a pattern no weight.
    """
    weights = tree.dotted_names(spec.like)
    found: dict[str, str | None] = {}
    for weight in weights:
        found[weight] = next((pattern for pattern in values if tree.matches(weight, [pattern])), None)
    left = [weight for weight, pattern in found.items() if pattern is None]
    unused = [pattern for pattern in values if pattern not in found.values()]
    if left or unused:
        what = f"no pattern matches the weights {left}" if left else f"the patterns {unused} match no weight first"
        raise ValueError(
            f"{name} has the keys {list(values)}, and they are neither the weights' nor patterns for all of them: "
            f"{what}; the weights are {weights}"
        )
    return [values[pattern] for pattern in found.values() if pattern is not None]


def is_zero(value: Any) -> bool:
    """Whether a hyperparameter is the number 0, so that what it multiplies needs no slot and no operation."""
    return isinstance(value, (int, float)) and value == 0


def _is_callable(value: Any) -> bool:
    return callable(value) or (isinstance(value, tuple) and any(_is_callable(entry) for entry in value))


def by_slot(per_leaf_slots: list[Slots], spec: tree.Spec) -> Tree:
    """List of ``{slot: tensor}`` to ``{slot: pytree like w}``."""
    by_name: Tree = {}
    for name in per_leaf_slots[0] if per_leaf_slots else ():
        of_leaves = [slots[name] for slots in per_leaf_slots]
        by_name[name] = tree.unflatten(of_leaves, spec)
    return by_name
