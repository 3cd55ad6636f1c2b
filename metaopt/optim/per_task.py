"""Optimisers that look at whole tensors, in a stacked meta-batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from metaopt.optim.wrapper import Wrapper
from metaopt.tree import Tree


@dataclass(frozen=True)
class PerTask(Wrapper):
    """The wrapped optimiser, mapped over the leading task axis of all weights.

    Element-wise optimisers need no wrapping. Those that take norms or products of whole tensors
    (:class:`ClipNorm`, :class:`Adafactor`, :class:`Muon`) would mix the tasks of a stacked
    meta-batch without it.
    """

    @property
    def elementwise(self) -> bool:
        """Across tasks: yes."""
        return True

    def init(self, w: Tree) -> Tree:
        """The wrapped optimiser's slots, one per task."""
        return {"inner": torch.vmap(self.optimizer.init)(w)}

    def update(self, g: Tree, w: Tree, slots: Tree, lam: Tree, t: int) -> tuple[Tree, Tree]:
        """One update per task."""
        w, inner = torch.vmap(lambda g, w, slots: self.optimizer.update(g, w, slots, lam, t))(g, w, slots["inner"])
        return w, {"inner": inner}
