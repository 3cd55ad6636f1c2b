"""An exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from metaopt import checks, tree
from metaopt.optim.optimizer import Check, Hyper, per_leaf
from metaopt.optim.wrapper import Wrapper
from metaopt.tree import Tree


@dataclass(frozen=True)
class EMA(Wrapper):
    r"""An exponential moving average of the weights beside the run, in the slot ``average``.

    .. math:: a_t = \delta\, a_{t-1} + (1 - \delta)\, w_t, \qquad a_0 = w_0

    Polyak and Juditsky 1992; Tarvainen and Valpola 2017, `arXiv 1703.01780
    <https://arxiv.org/abs/1703.01780>`__.

    The run itself is unchanged.

    Args:
        optimizer: moves the weights.
        decay: δ.

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 2 * w.sum(), mo.optim.EMA(mo.optim.SGD(lr=0.1), decay=0.9))
    >>> step(step.init(torch.zeros(1), None), None, None).w  # the weights themselves move as ever
    tensor([-0.2000])
    """

    decay: Hyper = 0.999

    hypers: ClassVar[tuple[str, ...]] = ("decay",)
    ranges: ClassVar[Mapping[str, Check]] = {"decay": checks.unit_interval}

    def init(self, w: Tree) -> Tree:
        """The weights, and the wrapped optimiser's slots."""
        return {"average": w, "inner": self.optimizer.init(w)}

    @override
    def update(self, g: Tree, w: Tree, slots: Tree, lam: Tree, t: int) -> tuple[Tree, Tree]:
        w, inner = self.optimizer.update(g, w, slots["inner"], lam, t)
        flat, spec = tree.flatten(w)
        before = tree.leaves(slots["average"])
        decays = per_leaf(self.decay, lam, t, spec, "decay")
        average = [decay * a + (1 - decay) * x for decay, a, x in zip(decays, before, flat, strict=True)]
        return w, {"average": tree.unflatten(average, spec), "inner": inner}
