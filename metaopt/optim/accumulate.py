"""Gradient accumulation: one update every few steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from metaopt import checks, tree
from metaopt.optim.optimizer import Check
from metaopt.optim.wrapper import Wrapper
from metaopt.tree import Tree


@dataclass(frozen=True)
class Accumulate(Wrapper):
    """The mean gradient of ``every`` steps makes one update; in between the weights stay.

    Slots: ``sum`` of the gradients since the last update, and ``inner``. The wrapped optimiser
    counts its own updates.

    Args:
        optimizer: gets the mean gradient.
        every: steps per update.
    """

    every: int = 1

    ranges: ClassVar[Mapping[str, Check]] = {"every": checks.count}

    def init(self, w: Tree) -> Tree:
        """Zeros, and the wrapped optimiser's slots."""
        return {"sum": tree.zeros_like(w), "inner": self.optimizer.init(w)}

    def update(self, g: Tree, w: Tree, slots: Tree, lam: Tree, t: int) -> tuple[Tree, Tree]:
        """Add up; update if it is time."""
        total = tree.add(slots["sum"], g)
        if t % self.every:
            return w, {"sum": total, "inner": slots["inner"]}
        w, inner = self.optimizer.update(tree.scale(1.0 / self.every, total), w, slots["inner"], lam, t // self.every)
        return w, {"sum": tree.scale(0.0, total), "inner": inner}
