"""Counting what an estimator does, without any global state: a step that counts how it is called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from typing_extensions import override

from metaopt.inner.contract import Linearized, Step, WrappedLinearized, WrappedStep, Wrt
from metaopt.inner.state import InnerState
from metaopt.tree import Tree


@dataclass
class Cost:
    """Work done, in units that do not depend on the machine.

    Attributes:
        steps: plain evaluations of Φ (one gradient of the inner loss each).
        linearizations: evaluations of Φ that kept the graph of the gradient (one gradient each, and
            the graph's memory).
        products: vector-Jacobian products ``αA`` and ``αB``, each counted once: what the papers
            call JVPs.
        tangents: Jacobian-vector products of Φ (forward mode); a column whose second-order product
            is known to be zero is not counted.
        losses: evaluations of the inner loss alone, with its gradient with respect to λ or w where
            the method takes it; a population under vmap counts once.
    """

    steps: int = 0
    linearizations: int = 0
    products: int = 0
    tangents: int = 0
    losses: int = 0

    def __str__(self) -> str:
        """What was done, in words: ``10 gradients, 20 products``."""
        counts = {
            "gradient": self.steps + self.linearizations,
            "product": self.products,
            "tangent": self.tangents,
            "loss": self.losses,
        }
        plural = {"loss": "losses"}
        said = [f"{n:,} {what if n == 1 else plural.get(what, what + 's')}" for what, n in counts.items() if n]
        return ", ".join(said) or "nothing"

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


class CountedStep(WrappedStep):
    """A step that adds what it is asked for to a :class:`Cost`; otherwise the step it wraps."""

    def __init__(self, step: Step, cost: Cost) -> None:
        """Wrap ``step``; ``cost`` is added to."""
        self.step = step
        self.cost = cost

    @override
    def __call__(self, state: InnerState, lam: Tree, batch: Any) -> InnerState:
        self.cost.steps += self.steps_in(batch)
        return self.step(state, lam, batch)

    @override
    def evaluate(self, state: InnerState, lam: Tree, batch: Any) -> tuple[InnerState, Tensor | None]:
        self.cost.steps += self.steps_in(batch)
        return self.step.evaluate(state, lam, batch)

    @override
    def linearize(self, state: InnerState, lam: Tree, batch: Any) -> CountedLinearized:
        steps = self.steps_in(batch)
        self.cost.linearizations += steps
        return CountedLinearized(self.step.linearize(state, lam, batch), self.cost, steps)

    @override
    def vjp(
        self, state: InnerState, lam: Tree, batch: Any, cotangent: InnerState, *, wrt: Wrt = "both"
    ) -> tuple[InnerState | None, Tree]:
        steps = self.steps_in(batch)
        self.cost.linearizations += steps
        self.cost.products += _products(wrt, steps)
        return self.step.vjp(state, lam, batch, cotangent, wrt=wrt)

    @override
    def around(self, step: Step) -> CountedStep:
        return CountedStep(step, self.cost)

    @override
    def loss(self, w: Tree, lam: Tree, batch: Any) -> Tensor:
        self.cost.losses += 1
        return self.step.loss(w, lam, batch)

    @override
    def adapt(self, state: InnerState, lam: Tree, batch: Any, alpha: Tree) -> tuple[Tree, Tree]:
        self.cost.steps += 1
        return self.step.adapt(state, lam, batch, alpha)


def _products(wrt: Wrt, steps: int) -> int:
    """The products of a pullback through some steps; all but the first need both."""
    return steps if wrt == "state" else 2 * steps - (wrt == "lam")


class CountedLinearized(WrappedLinearized):
    """A linearised step that counts its products."""

    __slots__ = ("_cost", "_steps")

    def __init__(self, inner: Linearized, cost: Cost, steps: int) -> None:
        """Wrap ``inner``, a group of ``steps`` steps; ``cost`` is added to."""
        self._inner = inner
        self._cost = cost
        self._steps = steps

    @override
    def pullback(
        self, cotangent: InnerState, wrt: Wrt = "both", *, last: bool = False
    ) -> tuple[InnerState | None, Tree]:
        self._cost.products += _products(wrt, self._steps)
        return self._inner.pullback(cotangent, wrt, last=last)

    @override
    def pushforward(
        self, state_dots: InnerState, lam_dots: Tree, *, columns_at_once: int | None = None, bound: float | None = None
    ) -> InnerState:
        before = self._inner.products
        dots = self._inner.pushforward(state_dots, lam_dots, columns_at_once=columns_at_once, bound=bound)
        self._cost.tangents += self._inner.products - before
        return dots
