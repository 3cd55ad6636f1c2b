"""Maximisation: ascent in place of descent."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from metaopt import tree
from metaopt.optim.wrapper import Wrapper
from metaopt.tree import Tree


@dataclass(frozen=True)
class Maximise(Wrapper):
    """The wrapped optimiser sees ``-g``: torch's ``maximize=True``.

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 2 * w.sum(), mo.optim.Maximise(mo.optim.SGD(lr=0.1)))
    >>> step(step.init(torch.zeros(1), None), None, None).w  # up the gradient
    tensor([0.2000])
    """

    @override
    def incoming(self, g: Tree, w: Tree, lam: Tree, t: int) -> Tree:
        return tree.scale(-1.0, g)
