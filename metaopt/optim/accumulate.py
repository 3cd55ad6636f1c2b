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
    r"""The mean gradient of several steps makes one update; in between the weights stay.

    .. math:: \bar g = \frac1k \sum_{i=t-k+1}^{t} g_i \qquad \text{at every } t \text{ that k divides}

    Slots: ``sum`` of the gradients since the last update, ``terms`` (how many there were), and
    ``inner``. The wrapped optimiser counts its own updates. A weight that had no gradient since the
    last update stays.

    Args:
        optimizer: gets the mean gradient.
        every: k, the steps per update.

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 2 * w.sum(), mo.optim.Accumulate(mo.optim.SGD(lr=0.1), every=2))
    >>> first = step(step.init(torch.zeros(1), None), None, None)
    >>> first.w, step(first, None, None).w  # nothing, then -lr · g
    (tensor([0.]), tensor([-0.2000]))
    """

    every: int = 1

    ranges: ClassVar[Mapping[str, Check]] = {"every": checks.count}

    def init(self, w: Tree) -> Tree:
        """Zeros, and the wrapped optimiser's slots."""
        return _empty(w, self.optimizer.init(w))

    def update(self, g: Tree, w: Tree, slots: Tree, lam: Tree, t: int) -> tuple[Tree, Tree]:
        """Adds the gradient to the sum; at every k-th step the wrapped optimiser gets the mean."""
        total = tree.add(slots["sum"], g)
        terms = tree.map(lambda count, x: count if x is None else count + 1, slots["terms"], g)
        inner = slots["inner"]
        if t % self.every:
            return w, {"sum": total, "terms": terms, "inner": inner}

        mean = tree.map(lambda x, count: x / self.every if count else None, total, terms)
        updates = t // self.every
        w, inner = self.optimizer.update(mean, w, inner, lam, updates)
        return w, _empty(total, inner)


def _empty(like: Tree, inner: Tree) -> Tree:
    """The slots where no gradient has been added yet."""
    terms = tree.map(lambda _: 0, like)
    return {"sum": tree.zeros_like(like), "terms": terms, "inner": inner}
