"""An optimiser around an optimiser: what gradient transforms, averages and groups share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from metaopt import checks, tree
from metaopt.optim.optimizer import Hyper, Optimizer
from metaopt.tree import Tree

CONVERT = "take one from mo.optim, or convert torch's with mo.interop.from_torch(optimizer, module)"


@dataclass(frozen=True)
class Wrapper(Optimizer):
    """Hands everything on to ``optimizer``.

    A subclass changes what comes in (:meth:`incoming`) or overrides :meth:`update`.

    Slots: ``inner``, those of the wrapped optimiser.

    Args:
        optimizer: the wrapped optimiser.
    """

    optimizer: Optimizer

    hypers: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        checks.instance(self, "optimizer", self.optimizer, Optimizer, CONVERT)
        super().__post_init__()

    def incoming(self, g: Tree, w: Tree, lam: Tree, t: int) -> Tree:
        """The gradient that the wrapped optimiser gets. Default: the same."""
        return g

    @override
    def init(self, w: Tree) -> Tree:
        return {"inner": self.optimizer.init(w)}

    def update(self, g: Tree, w: Tree, slots: Tree, lam: Tree, t: int) -> tuple[Tree, Tree]:
        """The wrapped optimiser's update with the transformed gradient."""
        w, inner = self.optimizer.update(self.incoming(g, w, lam, t), w, slots["inner"], lam, t)
        return w, {"inner": inner}

    @property
    def reads_lam(self) -> bool:
        """Whether this wrapper or the wrapped optimiser does."""
        return super().reads_lam or self.optimizer.reads_lam

    @property
    @override
    def elementwise(self) -> bool:
        return self.optimizer.elementwise

    @property
    @override
    def parts(self) -> list[Optimizer]:
        return [self.optimizer]

    @property
    @override
    def loss_decay(self) -> Hyper:
        return self.optimizer.loss_decay

    @property
    @override
    def steps_taken(self) -> int:
        return self.optimizer.steps_taken


def present(fn: Callable[[Tensor], Tensor], g: Tree) -> Tree:
    """``fn`` of every gradient that is there; a missing one stays missing."""
    return tree.map(lambda x: None if x is None else fn(x), g)


def value(hyper: Hyper, lam: Tree, t: int) -> Any:
    """A hyperparameter that is one number for all weights."""
    return hyper(lam, t) if callable(hyper) else hyper
