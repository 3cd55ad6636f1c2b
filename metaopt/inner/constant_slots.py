r"""An explicit approximation: the optimiser's slots held constant in the step's derivative.

With momentum SGD, :math:`w_t = w_{t-1} - \eta(\mu v_{t-1} + g)`, reading :math:`v_{t-1}` as a
constant gives
:math:`A_t = I - \eta H_t` in place of the true Jacobian of :math:`(w, v)`. That drops how λ acts through the momentum, and is
**not** the exact gradient (norm ratio 0.51 on a quadratic), but it damps the growth of the sweep;
published code often does it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from metaopt import tree
from metaopt.inner.contract import Linearized, Stationary, Step, Wrt
from metaopt.inner.state import InnerState
from metaopt.inner.tangents import Tangents
from metaopt.inner.tasks import is_stacked
from metaopt.tree import Tree


@dataclass(frozen=True)
class ConstantSlots:
    """The same Φ as ``step``, with a derivative that treats the slots as constants (biased.

    Off unless you wrap the step).

    >>> import torch, metaopt as mo
    >>> step = mo.inner.ConstantSlots(mo.inner_step(lambda w, lam, _: ((w - lam) ** 2).sum(), mo.optim.SGD(lr=0.1, momentum=0.9)))
    >>> step(step.init(torch.zeros(1), torch.ones(1)), torch.ones(1), None).w
    tensor([0.2000])
    """

    step: Step

    @property
    def stacked(self) -> bool:
        """Whether the weights have a task axis first."""
        return is_stacked(self.step)

    def init(self, w: Tree, lam: Tree) -> InnerState:
        """As ``step``."""
        return self.step.init(w, lam)

    def __call__(self, state: InnerState, lam: Tree, batch: Any) -> InnerState:
        """As ``step``."""
        return self.step(state, lam, batch)

    def linearize(self, state: InnerState, lam: Tree, batch: Any) -> LinearizedConstantSlots:
        """Φ with the approximate derivative."""
        return LinearizedConstantSlots(self.step.linearize(state, lam, batch))

    def vjp(
        self, state: InnerState, lam: Tree, batch: Any, cotangent: InnerState, *, wrt: Wrt = "both"
    ) -> tuple[InnerState | None, Tree]:
        """``(αA, αB)`` with the slots' rows and columns of A dropped."""
        return _without_slots(self.step.vjp(state, lam, batch, cotangent._replace(slots=None), wrt=wrt))

    def jvp(self, state: InnerState, lam: Tree, batch: Any, state_dot: InnerState, lam_dot: Tree) -> InnerState:
        """``A·state_dot + B·lam_dot`` with the slots' rows and columns of A dropped."""
        dot = self.step.jvp(state, lam, batch, state_dot._replace(slots=tree.zeros_like(state.slots)), lam_dot)
        return dot._replace(slots=tree.zeros_like(dot.slots))

    def tangents(self, state: InnerState, lam: Tree, batch: Any) -> ConstantSlotsTangents:
        """Φ with the approximate tangent map."""
        return ConstantSlotsTangents(self.step.tangents(state, lam, batch))

    def stationary(self, state: InnerState, rate: float | None) -> Stationary:
        """As ``step``."""
        return self.step.stationary(state, rate)

    def loss(self, w: Tree, lam: Tree, batch: Any) -> Tensor:
        """As ``step``."""
        return self.step.loss(w, lam, batch)

    def adapt(self, state: InnerState, lam: Tree, batch: Any, alpha: Tree) -> tuple[Tree, Tree]:
        """As ``step``."""
        return self.step.adapt(state, lam, batch, alpha)


class LinearizedConstantSlots:
    """A linearised step whose pullback ignores the slots."""

    __slots__ = ("_inner",)

    def __init__(self, inner: Linearized) -> None:
        """Wrap a linearised step."""
        self._inner = inner

    @property
    def state(self) -> InnerState:
        """Φ(state, λ; batch)."""
        return self._inner.state

    def pullback(self, cotangent: InnerState, wrt: Wrt = "both") -> tuple[InnerState | None, Tree]:
        """``(αA, αB)`` with the slots' cotangent dropped on the way in and on the way out."""
        return _without_slots(self._inner.pullback(cotangent._replace(slots=None), wrt))


class ConstantSlotsTangents:
    """A step's tangents that ignore the slots."""

    __slots__ = ("_inner",)

    def __init__(self, inner: Tangents) -> None:
        """Wrap a step's tangents."""
        self._inner = inner

    @property
    def state(self) -> InnerState:
        """Φ(state, λ; batch)."""
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
        """With the slots' tangents dropped on the way in and on the way out."""
        still = state_dots._replace(slots=tree.zeros_like(state_dots.slots))
        dots = self._inner.push(still, lam_dots, chunk_size=chunk_size, bound=bound)
        return dots._replace(slots=tree.zeros_like(dots.slots))


def _without_slots(products: tuple[InnerState | None, Tree]) -> tuple[InnerState | None, Tree]:
    state_bar, lam_bar = products
    return None if state_bar is None else state_bar._replace(slots=None), lam_bar
