"""Any differentiable Φ: learned optimisers, hand-written updates, simulators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from metaopt import tree
from metaopt.inner._graph import check_twice_differentiable
from metaopt.inner._transposed import Transposed, dots_of
from metaopt.inner.contract import Linearized, Stationary, Step, Wrt, check_weights
from metaopt.inner.state import InnerState
from metaopt.tree import Tree


def custom_step(
    fn: Callable[[InnerState, Tree, Any], InnerState], init: Callable[[Tree, Tree], InnerState] | None = None
) -> CustomStep:
    """A step from any pure function ``fn(state, lam, batch) -> state``.

    Args:
        fn: the step. It sees tensors that require grad, so it may call ``torch.autograd.grad(loss,
            ..., create_graph=True)``; it returns an :class:`InnerState` (or anything with the same
            fields) and must not change its arguments.
        init: ``(w, lam) -> InnerState``; default: no slots.

    :func:`metaopt.verify.check` tests whether a function keeps this contract.

    >>> import metaopt as mo
    >>> step = custom_step(lambda state, lam, batch: state._replace(w=0.5 * (state.w + lam)))
    >>> problem = mo.Problem(step, lambda w, lam, _: w.sum(), torch.zeros(1), torch.ones(1), [None] * 2)
    >>> problem.hypergradient(mo.RMD()).total  # exact: 1 - (1 - 0.5)²
    tensor([0.7500])
    """
    if not callable(fn):
        raise TypeError(f"custom_step needs a function (state, lam, batch) -> state, got {type(fn).__name__}")
    return CustomStep(fn, init)


@dataclass(frozen=True)
class CustomStep(Step):
    """Φ from a function; its derivatives by autograd through the function."""

    fn: Callable[[InnerState, Tree, Any], InnerState]
    initial: Callable[[Tree, Tree], InnerState] | None = None

    def init(self, w: Tree, lam: Tree) -> InnerState:
        """The state before the first step; differentiable as the step is."""
        check_weights(w)
        return InnerState(w) if self.initial is None else self.initial(w, lam)

    def __call__(self, state: InnerState, lam: Tree, batch: Any) -> InnerState:
        """Φ; differentiable by autograd where the inputs require grad."""
        if torch.is_grad_enabled() and (tree.requires_grad(state) or tree.requires_grad(lam)):
            return self._run(tree.map(_attached, state), lam, batch)  # fn may take a gradient with respect to w
        return self.linearize(state, lam, batch).state

    def linearize(self, state: InnerState, lam: Tree, batch: Any) -> LinearizedCustomStep:
        """Φ at this point with the whole graph of ``fn`` kept."""
        with torch.enable_grad():
            state_ = tree.attach(state)
            lam_ = tree.attach(lam)
            return LinearizedCustomStep(state_, lam_, self._run(state_, lam_, batch))

    def stationary(self, state: InnerState, rate: float | None) -> Stationary:
        """Φ itself: its fixed points are what it converges to.

        Raises:
            ValueError: if a rate other than 1 is given; a custom Φ has its own.
        """
        if rate not in (None, 1.0):
            raise ValueError(f"a custom step is its own fixed-point map and takes no rate, got {rate}")
        return Stationary(self, state, 1.0, symmetric=False)

    def _run(self, state: InnerState, lam: Tree, batch: Any) -> InnerState:
        new = self.fn(state, lam, batch)
        if not hasattr(new, "w"):
            raise TypeError(f"the custom step must return an InnerState(w, slots), got {type(new).__name__}")
        new = InnerState(new.w, getattr(new, "slots", {}), state.t + 1)
        tree.check_like(new.w, state.w, "the custom step's new w", "w")
        check_twice_differentiable(tree.floats(new), tree.floats(state))
        return new


def _attached(x: Any) -> Any:
    """A floating-point leaf that is not in a graph yet, as a fresh autograd leaf."""
    return x if not tree.is_float(x) or x.requires_grad else x.detach().requires_grad_()


class LinearizedCustomStep(Linearized):
    """:class:`CustomStep` at one point: its inputs and outputs, with the graph between them."""

    __slots__ = ("_lam", "_loss", "_new", "_products", "_state", "_transposed")

    def __init__(self, state: InnerState, lam: Tree, new: InnerState, loss: Tensor | None = None) -> None:
        self._state = state
        self._lam = lam
        self._new = new
        self._loss = loss
        self._transposed: Transposed | None = None
        self._products = 0

    @property
    @override
    def state(self) -> InnerState:
        return tree.detach(self._new)

    @property
    @override
    def loss(self) -> Tensor | None:
        return self._loss

    @override
    def pullback(
        self, cotangent: InnerState, wrt: Wrt = "both", *, last: bool = False
    ) -> tuple[InnerState | None, Tree]:
        """``(αA, αB)``: one backward pass through ``fn``."""
        slots = cotangent.slots if cotangent.slots is not None else tree.zeros_like(self._new.slots)
        outputs: list[Tensor] = tree.floats(self._new)
        seeds = tree.floats(InnerState(cotangent.w, slots))
        live = [(o, s) for o, s in zip(outputs, seeds, strict=True) if o.requires_grad]
        state_floats = tree.floats(self._state) if wrt != "lam" else []
        lam_floats = tree.floats(self._lam) if wrt != "state" else []
        inputs = state_floats + lam_floats
        bars: Any = [None] * len(inputs)
        if live and inputs:
            bars = torch.autograd.grad(
                [o for o, _ in live], inputs, [s for _, s in live], retain_graph=not last, allow_unused=True
            )
        supply = iter(bars)
        state_bar = None
        if wrt != "lam":
            state_bar = tree.map(lambda x: next(supply) if tree.is_float(x) else x, self._state)
            state_bar = tree.filled(state_bar, self._state)
        lam_bar = tree.map(lambda x: next(supply) if tree.is_float(x) else None, self._lam) if wrt != "state" else None
        return state_bar, lam_bar

    @override
    def pushforward(
        self, state_dots: InnerState, lam_dots: Tree, *, columns_at_once: int | None = None, bound: float | None = None
    ) -> InnerState:
        """The pullback is linear, and its transpose is the tangent map.

        Raises:
            ValueError: if a bound is given: there is no inner gradient here.
        """
        if bound is not None:
            raise ValueError(
                "a custom step has no inner gradient whose tangents could be bounded: bound them inside the step, or "
                "build it with inner_step"
            )
        dots = dots_of(state_dots, self._state) + dots_of(lam_dots, self._lam)
        self._products += len(dots[0])
        at_once = self.columns_at_once if columns_at_once is None else columns_at_once
        tangents = iter(self._map().push(dots, at_once))
        return tree.map(lambda x: next(tangents) if tree.is_float(x) else x, self._new)

    @property
    @override
    def columns_at_once(self) -> int:
        return self._map().columns_at_once

    @property
    @override
    def products(self) -> int:
        return self._products

    def _map(self) -> Transposed:
        """Cost, once: a backward pass, whose graph is kept."""
        if self._transposed is None:
            inputs = tree.floats(self._state) + tree.floats(self._lam)
            self._transposed = Transposed(tree.floats(self._new), inputs)
        return self._transposed
