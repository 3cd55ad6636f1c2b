"""An inner step at one point: the optimiser's derivatives around those of the gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from metaopt import tree
from metaopt.inner._tangents import InnerTangents
from metaopt.inner._update import pull_back
from metaopt.inner.adjoint import Gradient, like
from metaopt.inner.contract import Linearized, Wrt
from metaopt.inner.state import InnerState
from metaopt.optim.optimizer import Optimizer
from metaopt.tree import Tree


class LinearizedInnerStep(Linearized):
    """optimiser ∘ gradient at one point."""

    __slots__ = ("_at", "_gradient", "_lam", "_optimizer", "_state", "_tangents")

    def __init__(self, optimizer: Optimizer, gradient: Gradient, state: InnerState, lam: Tree) -> None:
        self._optimizer = optimizer
        self._gradient = gradient
        self._at = state
        self._lam = lam
        self._state: InnerState | None = None
        self._tangents: InnerTangents | None = None

    @property
    @override
    def state(self) -> InnerState:
        if self._state is None:
            at = self._at
            with torch.no_grad():
                w, slots = self._optimizer.update(tree.detach(self._gradient.g), at.w, at.slots, self._lam, at.t + 1)
            self._state = InnerState(w, slots, at.t + 1)
        return self._state

    @property
    @override
    def loss(self) -> Tensor:
        return self._gradient.value

    @override
    def pullback(
        self, cotangent: InnerState, wrt: Wrt = "both", *, last: bool = False
    ) -> tuple[InnerState | None, Tree]:
        """``(αA, αB)``: through the optimiser to ``u``, then one contraction of the gradient's graph with ``u``."""
        u, w_bar, slots_bar, lam_bar = pull_back(self._optimizer, self._gradient.g, self._at, self._lam, cotangent, wrt)
        hessian_part, mixed_part = self._gradient.contract(u, with_w=wrt != "lam", with_lam=wrt != "state", last=last)
        state_bar = None
        if wrt != "lam":
            parts = zip(w_bar, hessian_part, tree.leaves(self._at.w), strict=True)
            state_bar = InnerState(like(self._at.w, [_sum(a, b, x) for a, b, x in parts]), slots_bar, self._at.t)
        if wrt == "state":
            return state_bar, None
        supply = iter(mixed_part)
        mixed = tree.map(lambda x: next(supply) if tree.is_float(x) else None, self._lam)
        return state_bar, mixed if lam_bar is None else tree.add(mixed, lam_bar)

    @override
    def pushforward(
        self, state_dots: InnerState, lam_dots: Tree, *, columns_at_once: int | None = None, bound: float | None = None
    ) -> InnerState:
        """By symmetry of second derivatives a product of the gradient's graph, then the optimiser's tangent map."""
        tangents = self._tangent_map()
        at_once = tangents.columns_at_once if columns_at_once is None else columns_at_once
        return tangents.push(state_dots, lam_dots, columns_at_once=at_once, bound=bound)

    @property
    @override
    def columns_at_once(self) -> int:
        return self._tangent_map().columns_at_once

    @property
    @override
    def products(self) -> int:
        return 0 if self._tangents is None else self._tangents.products

    # -- parts -----------------------------------------------------------------------------------
    def _tangent_map(self) -> InnerTangents:
        if self._tangents is None:
            self._tangents = InnerTangents(self._gradient.graph(), self._optimizer, self._at, self._lam)
        return self._tangents


def _sum(a: Tensor | None, b: Tensor | None, like: Tensor) -> Tensor:
    if a is None:
        return torch.zeros_like(like) if b is None else b
    return a if b is None else a + b
