"""Counting what an estimator does, without any global state: a step that counts how it is called."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from metaopt.inner.chunk import Chunk
from metaopt.inner.contract import Linearized, Stationary, Step, StepAtSeveral, Wrt
from metaopt.inner.state import InnerState
from metaopt.inner.tangents import Tangents
from metaopt.inner.tasks import is_stacked
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

    def __add__(self, other: Cost) -> Cost:
        """Work of both."""
        return Cost(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


class CountedStep:
    """A step that adds what it is asked for to a :class:`Cost`; otherwise the step it wraps."""

    def __init__(self, step: Step, cost: Cost) -> None:
        """Wrap ``step``; ``cost`` is added to."""
        self.step, self.cost = step, cost

    @property
    def stacked(self) -> bool:
        """Whether the weights have a task axis first."""
        return is_stacked(self.step)

    def init(self, w: Tree, lam: Tree) -> InnerState:
        """As the wrapped step."""
        return self.step.init(w, lam)

    def __call__(self, state: InnerState, lam: Tree, batch: Any) -> InnerState:
        """As the wrapped step."""
        self.cost.steps += self._steps(batch)
        return self.step(state, lam, batch)

    def linearize(self, state: InnerState, lam: Tree, batch: Any) -> CountedLinearized:
        """As the wrapped step."""
        self.cost.linearizations += (steps := self._steps(batch))
        return CountedLinearized(self.step.linearize(state, lam, batch), self.cost, steps)

    def linearize_each(self, points: Iterable[tuple[InnerState, Any]], lam: Tree) -> list[CountedLinearized] | None:
        """As the wrapped step, if it can."""
        found = self.step.linearize_each(points, lam) if isinstance(self.step, StepAtSeveral) else None
        if found is None:
            return None
        self.cost.linearizations += len(found)
        return [CountedLinearized(linearized, self.cost, 1) for linearized in found]

    def vjp(
        self, state: InnerState, lam: Tree, batch: Any, cotangent: InnerState, *, wrt: Wrt = "both"
    ) -> tuple[InnerState | None, Tree]:
        """As the wrapped step."""
        self.cost.linearizations += (steps := self._steps(batch))
        self.cost.products += _products(wrt, steps)
        return self.step.vjp(state, lam, batch, cotangent, wrt=wrt)

    def jvp(self, state: InnerState, lam: Tree, batch: Any, state_dot: InnerState, lam_dot: Tree) -> InnerState:
        """As the wrapped step."""
        self.cost.tangents += self._steps(batch)
        return self.step.jvp(state, lam, batch, state_dot, lam_dot)

    def tangents(self, state: InnerState, lam: Tree, batch: Any) -> CountedTangents:
        """As the wrapped step."""
        self.cost.linearizations += self._steps(batch)
        return CountedTangents(self.step.tangents(state, lam, batch), self.cost)

    def stationary(self, state: InnerState, rate: float | None) -> Stationary:
        """As the wrapped step; the result counts too."""
        found = self.step.stationary(state, rate)
        return found._replace(step=CountedStep(found.step, self.cost))

    def loss(self, w: Tree, lam: Tree, batch: Any) -> Tensor:
        """As the wrapped step."""
        self.cost.losses += 1
        return self.step.loss(w, lam, batch)

    def adapt(self, state: InnerState, lam: Tree, batch: Any, alpha: Tree) -> tuple[Tree, Tree]:
        """As the wrapped step."""
        self.cost.steps += 1
        return self.step.adapt(state, lam, batch, alpha)

    def _steps(self, batch: Any) -> int:
        return len(batch) if isinstance(self.step, Chunk) else 1


def _products(wrt: Wrt, steps: int) -> int:
    """Of a pullback through some steps; all but the first need both."""
    return steps if wrt == "state" else 2 * steps - (wrt == "lam")


class CountedLinearized:
    """A linearised step that counts its products."""

    __slots__ = ("_cost", "_inner", "_steps")

    def __init__(self, inner: Linearized, cost: Cost, steps: int) -> None:
        """Wrap ``inner``, which is that of so many steps; ``cost`` is added to."""
        self._inner, self._cost, self._steps = inner, cost, steps

    @property
    def state(self) -> InnerState:
        """Φ at this point."""
        return self._inner.state

    def pullback(self, cotangent: InnerState, wrt: Wrt = "both") -> tuple[InnerState | None, Tree]:
        """``(αA, αB)``."""
        self._cost.products += _products(wrt, self._steps)
        return self._inner.pullback(cotangent, wrt)


class CountedTangents:
    """A step's tangents that count their products."""

    __slots__ = ("_cost", "_inner")

    def __init__(self, inner: Tangents, cost: Cost) -> None:
        """Wrap ``inner``; ``cost`` is added to."""
        self._inner, self._cost = inner, cost

    @property
    def state(self) -> InnerState:
        """Φ at this point."""
        return self._inner.state

    @property
    def products(self) -> int:
        """As the wrapped step's."""
        return self._inner.products

    @property
    def columns_at_once(self) -> int:
        """As the wrapped step's."""
        return self._inner.columns_at_once

    def push(
        self, state_dots: InnerState, lam_dots: Tree, *, chunk_size: int, bound: float | None = None
    ) -> InnerState:
        """As the wrapped step's."""
        before = self._inner.products
        dots = self._inner.push(state_dots, lam_dots, chunk_size=chunk_size, bound=bound)
        self._cost.tangents += self._inner.products - before
        return dots
