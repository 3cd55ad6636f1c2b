"""An explicit approximation: the optimiser's slots held constant in the step's derivative."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from metaopt import tree
from metaopt.inner.contract import Linearized, Stationary, Step, WrappedLinearized, WrappedStep, Wrt
from metaopt.inner.state import InnerState
from metaopt.tree import Tree


@dataclass(frozen=True)
class ConstantSlots(WrappedStep):
    r"""The same Φ as ``step``, with a derivative that treats the slots as constants.

    .. math:: A_t = \frac{\partial w_t}{\partial w_{t-1}}\Big|_{v_{t-1}}
        \qquad (\text{momentum SGD: } I - \eta H_t)

    It takes the place of the Jacobian of :math:`(w, v)`. Published code often does this, since it
    damps the growth of the sweep.

    Cost and memory: those of ``step``. Bias: what λ does through the slots is dropped. The result
    is **not** the exact gradient (norm ratio 0.51 on a quadratic with momentum).

    Args:
        step: a step with slots.

    >>> import torch, metaopt as mo
    >>> momentum = mo.optim.SGD(lr=0.1, momentum=0.9)
    >>> step = mo.inner.ConstantSlots(mo.inner_step(lambda w, lam, _: ((w - lam) ** 2).sum(), momentum))
    >>> step(step.init(torch.zeros(1), torch.ones(1)), torch.ones(1), None).w
    tensor([0.2000])
    """

    step: Step

    @override
    def around(self, step: Step) -> ConstantSlots:
        return ConstantSlots(step)

    @override
    def stationary(self, state: InnerState, rate: float | None) -> Stationary:
        return self.step.stationary(state, rate)  # which has no slots

    @override
    def linearize(self, state: InnerState, lam: Tree, batch: Any) -> LinearizedConstantSlots:
        return LinearizedConstantSlots(self.step.linearize(state, lam, batch))


class LinearizedConstantSlots(WrappedLinearized):
    """A linearised step whose derivative takes the slots for constants."""

    __slots__ = ()

    def __init__(self, inner: Linearized) -> None:
        self._inner = inner

    @override
    def pullback(
        self, cotangent: InnerState, wrt: Wrt = "both", *, last: bool = False
    ) -> tuple[InnerState | None, Tree]:
        """``(αA, αB)`` with the slots' cotangent dropped on the way in and on the way out."""
        return _without_slots(self._inner.pullback(cotangent._replace(slots=None), wrt, last=last))

    @override
    def pushforward(
        self, state_dots: InnerState, lam_dots: Tree, *, columns_at_once: int | None = None, bound: float | None = None
    ) -> InnerState:
        """With the slots' tangents dropped on the way in and on the way out."""
        still = state_dots._replace(slots=tree.zeros_like(state_dots.slots))
        dots = self._inner.pushforward(still, lam_dots, columns_at_once=columns_at_once, bound=bound)
        return dots._replace(slots=tree.zeros_like(dots.slots))


def _without_slots(products: tuple[InnerState | None, Tree]) -> tuple[InnerState | None, Tree]:
    state_bar, lam_bar = products
    return None if state_bar is None else state_bar._replace(slots=None), lam_bar
