"""Named groups of weights, each with its optimiser, and weights that do not move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from metaopt import checks, tree
from metaopt.optim.optimizer import Hyper, Optimizer, Slots
from metaopt.optim.wrapper import CONVERT
from metaopt.tree import Tree


@dataclass(frozen=True)
class Frozen(Optimizer):
    """An optimiser that leaves the weights where they are, for a group of :class:`Groups`."""

    hypers: ClassVar[tuple[str, ...]] = ()

    @override
    def init_leaf(self, w: Tensor) -> Slots:
        return {}

    @override
    def update_leaf(self, g: Tensor, w: Tensor, slots: Slots, hyper: dict[str, Any], t: int) -> tuple[Tensor, Slots]:
        return w, slots


@dataclass(frozen=True)
class Groups(Optimizer):
    """Each weight goes to the first group one of whose patterns matches its name.

    Names are dictionary keys joined by dots (``"0.weight"`` for ``{"0.weight": …}`` and for ``{"0":
    {"weight": …}}``). A group's weights form a list, so element-wise hyperparameters of a group are
    lists too. Slots: ``"0"``, ``"1"``, … by group.

    Args:
        groups: ``(patterns, optimiser)``, e.g. ``[(["head.*"], SGD(lr=0.1)), (["*"], Frozen())]``.

    Raises:
        ValueError: if a weight matches no group, or a group (other than ``["*"]``) no weight.

    >>> import metaopt as mo, torch
    >>> rule = mo.optim.Groups([(["head.*"], mo.optim.SGD(lr=0.1)), (["*"], mo.optim.Frozen())])
    >>> step = mo.inner_step(lambda w, lam, _: 2 * (w["head.bias"] + w["body.bias"]), rule)
    >>> w = {"head.bias": torch.tensor(0.0), "body.bias": torch.tensor(0.0)}
    >>> step(step.init(w, None), None, None).w
    {'head.bias': tensor(-0.2000), 'body.bias': tensor(0.)}
    """

    groups: Sequence[tuple[Sequence[str], Optimizer]]

    @property
    @override
    def parts(self) -> list[Optimizer]:
        return [optimizer for _, optimizer in self.groups]

    @property
    @override
    def loss_decay(self) -> Hyper:
        decays = [optimizer.loss_decay for _, optimizer in self.groups]
        if any([decay != decays[0] for decay in decays]):
            raise ValueError(
                "the groups have different weight decays, which implicit differentiation does not see: put them into "
                "inner_loss, and set weight_decay=0"
            )
        return decays[0]

    hypers: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        checks.instance(self, "groups", self.groups, (list, tuple), 'for instance [(["head.*"], optimiser), …]')
        for group in self.groups:
            checks.pair(self, "groups", group)
            patterns, optimizer = group
            checks.instance(self, "the patterns in groups", patterns, (list, tuple), 'for instance ["head.*"]')
            checks.instance(self, "the optimiser in groups", optimizer, Optimizer, CONVERT)

    @override
    def init(self, w: Tree) -> Tree:
        flat = tree.leaves(w)
        members = self._members(w)
        slots = {}
        for i, (_, optimizer) in enumerate(self.groups):
            mine = [flat[j] for j in members[i]]
            slots[str(i)] = optimizer.init(mine)
        return slots

    def update(self, g: Tree, w: Tree, slots: Tree, lam: Tree, t: int) -> tuple[Tree, Tree]:
        """Each group by its own optimiser."""
        flat, spec = tree.flatten(w)
        flat_g = tree.leaves(g)
        members = self._members(w)
        new_slots = {}
        for i, (_, optimizer) in enumerate(self.groups):
            mine = members[i]
            w_mine = [flat[j] for j in mine]
            g_mine = [flat_g[j] for j in mine]
            moved, new_slots[str(i)] = optimizer.update(g_mine, w_mine, slots[str(i)], lam, t)
            for j, x in zip(mine, moved, strict=True):
                flat[j] = x
        return tree.unflatten(flat, spec), new_slots

    @property
    @override
    def elementwise(self) -> bool:
        return all(optimizer.elementwise for _, optimizer in self.groups)

    @property
    @override
    def reads_lam(self) -> bool:
        return any(optimizer.reads_lam for _, optimizer in self.groups)

    @property
    @override
    def steps_taken(self) -> int:
        return self.groups[0][1].steps_taken

    def _members(self, w: Tree) -> list[list[int]]:
        """For each group the numbers of its leaves."""
        members: list[list[int]] = [[] for _ in self.groups]
        for j, name in enumerate(tree.dotted_names(w)):
            for i, (patterns, _) in enumerate(self.groups):
                if tree.matches(name, patterns):
                    members[i].append(j)
                    break
            else:
                raise ValueError(
                    f"the weight {name!r} is in no group; add a last group (['*'], optimiser), or (['*'], "
                    "mo.optim.Frozen())"
                )
        for i, mine in enumerate(members):
            if not mine and list(self.groups[i][0]) != ["*"]:  # that group takes what is left, if anything
                raise ValueError(f"the group {list(self.groups[i][0])} has no weight; names are {tree.dotted_names(w)}")
        return members
