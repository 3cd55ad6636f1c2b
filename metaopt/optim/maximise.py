"""Ascent instead of descent."""

from __future__ import annotations

from dataclasses import dataclass

from metaopt import tree
from metaopt.optim.wrapper import Wrapper
from metaopt.tree import Tree


@dataclass(frozen=True)
class Maximise(Wrapper):
    """The wrapped optimiser sees ``-g``: torch's ``maximize=True``."""

    def incoming(self, g: Tree, w: Tree, lam: Tree, t: int) -> Tree:
        """Negated."""
        return tree.scale(-1.0, g)
