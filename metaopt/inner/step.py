r"""The inner step Φ = optimiser ∘ gradient, and its adjoint.

For a cotangent :math:`(\alpha_w, \alpha_v)` of the next state, the adjoint first pulls back through
the optimiser (element-wise) to a cotangent :math:`u` of the inner gradient :math:`g = \nabla_w L(w,
\lambda)`, and then needs one contraction of the gradient's own graph, :math:`(u^\top \partial^2
L/\partial w^2,\; u^\top \partial^2 L/\partial w \partial\lambda)`; how that one is taken is the
choice of an object from :mod:`metaopt.inner.adjoint`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from metaopt import tree
from metaopt.inner._update import pull_back, push_forward
from metaopt.inner.adjoint import (
    Adjoint,
    Gradient,
    RandomState,
    ReverseOverReverse,
    check_twice_differentiable,
    dots_of,
    gradient_of,
    transposed_twice,
)
from metaopt.inner.compiled import Compilation, CompiledPoint
from metaopt.inner.contract import InnerLoss, Linearized, Stationary, Wrt, check_weights, checked_scalar
from metaopt.inner.reweighted import AsymmetricUpdateError
from metaopt.inner.state import InnerState
from metaopt.inner.tangents import InnerTangents
from metaopt.inner.tasks import Stacked, TaskLoss, is_stacked
from metaopt.optim.optimizer import Optimizer
from metaopt.optim.per_task import PerTask
from metaopt.optim.sgd import SGD
from metaopt.tree import Tree


def inner_step(
    inner_loss: InnerLoss, optimizer: Optimizer, *, adjoint: Adjoint = ReverseOverReverse(), compile: bool | str = False
) -> InnerStep:
    """The inner step ``Φ(state, λ; batch)`` of a loss and an optimiser from :mod:`metaopt.inner`.

    Args:
        inner_loss: ``(w, lam, batch) -> scalar``; built from differentiable torch operations.
        optimizer: an inner optimiser, e.g. ``mo.optim.SGD(lr=0.1)``. Over stacked tasks one that
            looks at whole tensors is mapped over them (:class:`metaopt.optim.PerTask`). A ``torch.optim`` one is
            in-place and cannot be differentiated: convert it with :mod:`metaopt.interop`.
        adjoint: how second-order products are taken: ``mo.inner.ReverseOverReverse()`` or
            ``mo.inner.ForwardOverReverse()``.
        compile: whether Φ and its adjoint are compiled (``True``: inductor, or the name of a
            backend of :func:`torch.compile`). What cannot be compiled runs eagerly, and a warning
            says why. The first calls take seconds: ``step.compilation.seconds``. Values agree to
            rounding; the adjoint is always reverse over reverse. :func:`metaopt.compiled_loss` does
            the same for the outer loss.

    Raises:
        TypeError: if one of the two is not what it should be.
    """
    if not callable(inner_loss):
        raise TypeError(f"inner_loss must be a function (w, lam, batch) -> scalar, got {type(inner_loss).__name__}")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must come from metaopt.optim, e.g. mo.optim.SGD(lr=0.1); got {type(optimizer).__name__}"
        )
    if isinstance(inner_loss, TaskLoss) and inner_loss.reduction != "sum":
        raise ValueError(
            "the inner loss of stacked tasks is their sum: a mean divides the learning rate of each task by the number "
            'of tasks. Take reduction="sum" (the default)'
        )
    if is_stacked(inner_loss) and not optimizer.elementwise:
        optimizer = PerTask(optimizer)
    step = InnerStep(inner_loss, optimizer, adjoint)
    if compile is False:
        return step
    return replace(step, compilation=Compilation(step.pure, "inductor" if compile is True else compile))


@dataclass(frozen=True)
class InnerStep:
    r"""Φ: one optimiser step on ``inner_loss``; pure.

    ``step(state, lam, batch)`` is differentiable by plain autograd where its inputs require grad,
    and keeps no graph where they do not. :meth:`vjp` and :meth:`jvp` are the cheap way to its
    derivatives.

    Attributes:
        inner_loss: ``(w, lam, batch) -> scalar``.
        optimizer: the update rule.
        adjoint: how second-order products are taken.
        compilation: the compiled functions, where they were asked for.
    """

    inner_loss: InnerLoss
    optimizer: Optimizer
    adjoint: Adjoint = ReverseOverReverse()
    compilation: Compilation | None = field(default=None, repr=False, compare=False)
    _twice: list[bool] = field(
        default_factory=list, init=False, repr=False, compare=False
    )  # not empty: a gradient's graph has been checked

    @property
    def stacked(self) -> bool:
        """Whether every weight has a task axis first (:func:`metaopt.vmapped`, :func:`metaopt.looped`)."""
        return is_stacked(self.inner_loss)

    def init(self, w: Tree, lam: Tree) -> InnerState:
        """The state before the first step: the weights (detached) and fresh slots.

        Raises:
            ValueError: if a weight is not a floating-point tensor.
        """
        w = w.w if isinstance(w, Stacked) else w
        check_weights(w)
        w = tree.detach(w)
        return InnerState(w, self.optimizer.init(w), self.optimizer.steps_taken)

    def __call__(self, state: InnerState, lam: Tree, batch: Any) -> InnerState:
        """Φ. Cost: one gradient."""
        if torch.is_grad_enabled() and (tree.requires_grad(state) or tree.requires_grad(lam)):
            w = tree.map(lambda x: x if x.requires_grad else x.detach().requires_grad_(), state.w)
            g = gradient_of(self._loss(w, lam, batch), w, graph=True)
            if not self._twice:
                self._check(g, w)
            return self._next(g, state._replace(w=w), lam)
        if self.compilation is not None and (new := self.compilation.next(state, lam, batch)) is not None:
            return new
        with torch.enable_grad():
            w = tree.attach(state.w)
            g = gradient_of(self._loss(w, lam, batch), w, graph=False)
        with torch.no_grad():
            return self._next(g, state, lam)

    def linearize(self, state: InnerState, lam: Tree, batch: Any) -> Linearized:
        """Φ at this point with the graph of its gradient kept. Cost: one gradient.

        The graph lives as long as the result.

        Compiled, no graph is kept, and each pullback evaluates the gradient again.
        """
        if self.compilation is not None and self.compilation.refused is None:
            return CompiledPoint(self.compilation, state, lam, batch, lambda: self._graph(state, lam, batch))
        return self._graph(state, lam, batch)

    def linearize_each(self, points: Iterable[tuple[InnerState, Any]], lam: Tree) -> list[LinearizedOnce] | None:
        """See :class:`StepAtSeveral`. Cost: one gradient each.

        ``None`` where the step is compiled or not reverse over reverse.
        """
        compiled = self.compilation is not None and self.compilation.refused is None
        if compiled or not isinstance(self.adjoint, ReverseOverReverse):
            return None
        gradients = self.adjoint.gradients(self._loss, points, lam)
        for state, gradient in gradients:
            if not self._twice:
                self._check(gradient.g, state.w)
        return [LinearizedOnce(self, state, lam, gradient) for state, gradient in gradients]

    def _graph(self, state: InnerState, lam: Tree, batch: Any) -> LinearizedInnerStep:
        gradient = self.adjoint.gradient(self._loss, state.w, lam, batch)
        if not self._twice:
            self._check(gradient.g, state.w)
        return LinearizedInnerStep(self, state, lam, gradient)

    def vjp(
        self, state: InnerState, lam: Tree, batch: Any, cotangent: InnerState, *, wrt: Wrt = "both"
    ) -> tuple[InnerState | None, Tree]:
        """The step adjoint ``(αA, αB)``. Cost.

        One gradient and one contraction of its graph (about three plain steps).
        """
        linearized = self.linearize(state, lam, batch)
        return (
            linearized.last_pullback(cotangent, wrt)
            if isinstance(linearized, LinearizedInnerStep)
            else linearized.pullback(cotangent, wrt)
        )

    def jvp(self, state: InnerState, lam: Tree, batch: Any, state_dot: InnerState, lam_dot: Tree) -> InnerState:
        r"""The tangent ``A·state_dot + B·lam_dot``.

        By symmetry of second derivatives the inner gradient's tangent is
        :math:`\nabla_w\,(\nabla_w L \cdot \dot w + \nabla_\lambda L \cdot \dot\lambda)`: reverse mode twice, so it works wherever a
        double backward does. Where that symmetry is missing (:func:`metaopt.inner.reweighted`), the
        step adjoint is transposed instead, at about twice the cost. The optimiser's part is forward
        mode.
        """
        random = RandomState(state.w)
        with torch.enable_grad():
            w, lam_ = tree.attach(state.w), tree.attach(lam)
            try:
                g, g_dot = self._by_symmetry(w, lam_, batch, state_dot, lam_dot)
            except AsymmetricUpdateError:
                with random.again():
                    live = tree.leaves(gradient_of(self._loss(w, lam_, batch), w, graph=True))
                dots = tree.leaves(state_dot.w) + dots_of(lam_dot, lam_)
                g, g_dot = live, transposed_twice(live, tree.leaves(w) + tree.floats(lam_), dots)
        spec = tree.flatten(state.w)[1]
        g, g_dot = tree.unflatten([x.detach() for x in g], spec), tree.unflatten(g_dot, spec)
        w_dot, slots_dot = push_forward(self.optimizer, g, state, lam, g_dot, state_dot, lam_dot)
        return InnerState(w_dot, slots_dot, state.t + 1)

    def tangents(self, state: InnerState, lam: Tree, batch: Any) -> InnerTangents:
        """Φ and its tangent map. Cost: one gradient with respect to ``(w, λ)``.

        Its graph lives as long as the result.
        """
        return InnerTangents(self._loss, self.optimizer, state, lam, batch)

    def stationary(self, state: InnerState, rate: float | None) -> Stationary:
        r"""Gradient descent of the given rate on the same loss: :math:`I - A = a H`, :math:`B = -a\, \partial^2 L/\partial w \partial\lambda`.

        The fixed points of every optimiser here are those of gradient descent, and its :math:`A` is
        symmetric. Weight decay inside the optimiser and frozen weights are not seen: a decay that
        is part of the problem belongs into the loss.

        Raises:
            ValueError: if ``rate`` is ``None`` and the optimiser's learning rate is no plain number
                that could serve.
        """
        if rate is None:
            rate = getattr(self.optimizer, "lr", None)
            if not isinstance(rate, (int, float)):
                raise ValueError(
                    "the inner learning rate is no plain number, so it cannot serve as the Neumann series' rate: "
                    "give it, Neumann(terms, rate=0.01)"
                )
        return Stationary(
            InnerStep(self.inner_loss, SGD(lr=float(rate)), self.adjoint), InnerState(state.w, {}, state.t), float(rate)
        )

    def loss(self, w: Tree, lam: Tree, batch: Any) -> Tensor:
        """The inner loss."""
        return self._loss(w, lam, batch)

    def adapt(self, state: InnerState, lam: Tree, batch: Any, alpha: Tree) -> tuple[Tree, Tree]:
        """``alpha · ∂w'/∂g``, element-wise (gradient descent.

        ``-lr · alpha``), and ``alpha · ∂w'/∂λ`` at fixed g. Cost: one gradient.
        """
        with torch.enable_grad():
            w = tree.attach(state.w)
            g = gradient_of(self._loss(w, lam, batch), w, graph=False)
        u, _, _, lam_bar = pull_back(
            self.optimizer, g, state, tree.detach(lam), InnerState(alpha, None, state.t), "lam"
        )
        return tree.unflatten(u, tree.flatten(state.w)[1]), lam_bar

    def pure(self, w: Tree, slots: Tree, lam: Tree, batch: Any, numbers: tuple[int, ...]) -> tuple[Tree, Tree]:
        """Φ for a compiler to trace: the weights and slots after the step of this one number."""
        g = torch.func.grad(self._loss)(w, lam, batch)
        return self.optimizer.update(g, w, slots, lam, numbers[0])

    # -- parts -----------------------------------------------------------------------------------
    def _check(self, g: Tree, w: Tree) -> None:
        """Whether the first gradient that has a graph can be differentiated again.

        Once, since on a small net it takes as long as an operation.
        """
        if tree.requires_grad(g):
            check_twice_differentiable(tree.leaves(g), tree.leaves(w))
            self._twice.append(True)

    def _loss(self, w: Tree, lam: Tree, batch: Any) -> Tensor:
        return checked_scalar(self.inner_loss(w, lam, batch), "inner_loss")

    def _by_symmetry(
        self, w: Tree, lam: Tree, batch: Any, state_dot: InnerState, lam_dot: Tree
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The inner gradient and its tangent, as leaves: ``∇_w (∇_w L · ẇ + ∇_λ L · λ̇)``."""
        loss = self._loss(w, lam, batch)
        w_flat, lam_flat = tree.leaves(w), tree.floats(lam)
        gradients = torch.autograd.grad(loss, w_flat + lam_flat, create_graph=True, allow_unused=True)
        check_twice_differentiable(gradients)
        dots = tree.leaves(state_dot.w) + dots_of(lam_dot, lam)
        terms = [(g * dot).sum() for g, dot in zip(gradients, dots, strict=True) if g is not None and g.requires_grad]
        slopes = (
            torch.autograd.grad(torch.stack(terms).sum(), w_flat, allow_unused=True) if terms else [None] * len(w_flat)
        )
        g = [_zero_if_none(g, x) for g, x in zip(gradients[: len(w_flat)], w_flat, strict=True)]
        return g, [_zero_if_none(s, x) for s, x in zip(slopes, w_flat, strict=True)]

    def _next(self, g: Tree, state: InnerState, lam: Tree) -> InnerState:
        w, slots = self.optimizer.update(g, state.w, state.slots, lam, state.t + 1)
        return InnerState(w, slots, state.t + 1)


class LinearizedInnerStep:
    """:class:`InnerStep` at one point; see :class:`Linearized`."""

    __slots__ = ("_at", "_gradient", "_lam", "_state", "_step")

    def __init__(self, step: InnerStep, state: InnerState, lam: Tree, gradient: Gradient) -> None:
        """Keep the point and the gradient there."""
        self._step, self._at, self._lam, self._gradient = step, state, lam, gradient
        self._state: InnerState | None = None

    @property
    def state(self) -> InnerState:
        """Φ(state, λ; batch), detached; computed when first asked for, from the gradient that is there already."""
        if self._state is None:
            with torch.no_grad():
                self._state = self._step._next(tree.detach(self._gradient.g), self._at, self._lam)
        return self._state

    def pullback(self, cotangent: InnerState, wrt: Wrt = "both") -> tuple[InnerState | None, Tree]:
        """``(αA, αB)``: through the optimiser to ``u``, then one contraction of the gradient's graph with ``u``."""
        return self._pullback(cotangent, wrt, last=False)

    def last_pullback(self, cotangent: InnerState, wrt: Wrt = "both") -> tuple[InnerState | None, Tree]:
        """The same, giving the graph's memory back as it is swept; there is no pullback after it."""
        return self._pullback(cotangent, wrt, last=True)

    def _pullback(self, cotangent: InnerState, wrt: Wrt, *, last: bool) -> tuple[InnerState | None, Tree]:
        u, w_bar, slots_bar, lam_bar = pull_back(
            self._step.optimizer, self._gradient.g, self._at, self._lam, cotangent, wrt
        )
        hessian_part, mixed_part = self._gradient.contract(u, with_w=wrt != "lam", with_lam=wrt != "state", last=last)
        state_bar = None
        if wrt != "lam":
            w, spec = tree.flatten(self._at.w)
            parts = zip(w_bar, hessian_part, w, strict=True)
            state_bar = InnerState(
                tree.unflatten([_sum(a, b, like) for a, b, like in parts], spec), slots_bar, self._at.t
            )
        if wrt == "state":
            return state_bar, None
        supply = iter(mixed_part)
        mixed = tree.map(lambda x: next(supply) if tree.is_float(x) else None, self._lam)
        return state_bar, mixed if lam_bar is None else tree.add(mixed, lam_bar)


class LinearizedOnce(LinearizedInnerStep):
    """For a single pullback."""

    __slots__ = ()

    def pullback(self, cotangent: InnerState, wrt: Wrt = "both") -> tuple[InnerState | None, Tree]:
        """``(αA, αB)``, giving the graph's memory back as it is swept."""
        return self.last_pullback(cotangent, wrt)


def _sum(a: Tensor | None, b: Tensor | None, like: Tensor) -> Tensor:
    if a is None or b is None:
        return _zero_if_none(a if b is None else b, like)
    return a + b


def _zero_if_none(value: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if value is None else value
