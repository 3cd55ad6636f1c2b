r"""The inner step Φ = optimiser ∘ gradient, and its adjoint.

For a cotangent :math:`(\alpha_w, \alpha_v)` of the next state, the adjoint first pulls back through
the optimiser (element-wise) to a cotangent :math:`u` of the inner gradient :math:`g = \nabla_w L(w,
\lambda)`, and then needs one contraction of the gradient's own graph, :math:`(u^\top \partial^2
L/\partial w^2,\; u^\top \partial^2 L/\partial w \partial\lambda)`; how that one is taken is the
choice of an object from :mod:`metaopt.inner.adjoint`.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from typing_extensions import override

from metaopt import replay, tree
from metaopt.inner._first_look import FirstLook, written_into
from metaopt.inner._linearized import LinearizedInnerStep
from metaopt.inner._update import pull_back
from metaopt.inner.adjoint import Adjoint, Gradients, check_reached, gradient_of, like
from metaopt.inner.compiled import Compilation, CompiledPoint
from metaopt.inner.contract import (
    InnerLoss,
    Linearized,
    Stationary,
    Step,
    WrappedStep,
    check_weights,
    checked_scalar,
)
from metaopt.inner.reverse_over_reverse import ReverseOverReverse
from metaopt.inner.state import InnerState
from metaopt.inner.tasks import Stacked, TaskLoss, is_stacked
from metaopt.optim.optimizer import Optimizer
from metaopt.optim.per_task import PerTask
from metaopt.optim.sgd import SGD
from metaopt.tree import Tree


def inner_step(inner_loss: InnerLoss, optimizer: Optimizer, *, adjoint: Adjoint = ReverseOverReverse()) -> InnerStep:
    """The inner step ``Φ(state, λ; batch)`` of a loss and an optimiser from :mod:`metaopt.optim`.

    :func:`metaopt.compiled` makes a compiled one of it.

    Args:
        inner_loss: ``(w, lam, batch) -> scalar``; built from differentiable torch operations.
        optimizer: an inner optimiser, e.g. ``mo.optim.SGD(lr=0.1)``. Over stacked tasks one that
            looks at whole tensors is mapped over them (:class:`metaopt.optim.PerTask`). A
            ``torch.optim`` one is in-place and cannot be differentiated: convert it with
            :mod:`metaopt.interop`.
        adjoint: how second-order products are taken: ``mo.inner.ReverseOverReverse()`` or
            ``mo.inner.ForwardOverReverse()``.

    Raises:
        TypeError: if one of the two is not what it should be.
    """
    if not callable(inner_loss):
        raise TypeError(f"inner_loss must be a function (w, lam, batch) -> scalar, got {type(inner_loss).__name__}")
    return InnerStep(inner_loss, check_optimizer(optimizer, inner_loss), adjoint)


def check_optimizer(optimizer: Optimizer, inner_loss: Any) -> Optimizer:
    """The optimiser of an inner loss; mapped over stacked tasks where it looks at whole tensors."""
    if not isinstance(optimizer, Optimizer):
        kind = f"{type(optimizer).__module__.partition('.')[0]}'s {type(optimizer).__name__}"
        raise TypeError(
            f"optimizer must come from metaopt.optim, e.g. mo.optim.SGD(lr=0.1); got {kind}: "
            "mo.interop.from_torch(optimizer, module) converts one of torch.optim"
        )
    if isinstance(inner_loss, TaskLoss) and inner_loss.reduction != "sum":
        raise ValueError(
            "the inner loss of stacked tasks is their sum: a mean divides the learning rate of each task by the number "
            'of tasks. Take reduction="sum" (the default)'
        )
    if is_stacked(inner_loss) and not optimizer.elementwise:
        return PerTask(optimizer)
    return optimizer


class StepOfLoss(Step):
    """A step that is made of an inner loss.

    Attributes:
        inner_loss: the loss, of one task or mapped over several.
    """

    inner_loss: Any
    _look: FirstLook

    @property
    @override
    def stacked(self) -> bool:
        return is_stacked(self.inner_loss)

    @property
    @override
    def undeclared(self) -> list[str]:
        return self._look.undeclared


@dataclass(frozen=True, repr=False)
class InnerStep(StepOfLoss):
    r"""Φ: one optimiser step on ``inner_loss``; pure.

    .. math:: (w', v') = \mathrm{optimiser}(\nabla_w L(w, \lambda; D),\; w, v, \lambda)

    ``step(state, lam, batch)`` is differentiable by plain autograd where its inputs require grad,
    and keeps no graph where they do not. :meth:`linearize` is the cheap way to its derivatives.

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
    _gradients: Gradients = field(init=False, repr=False, compare=False)
    _look: FirstLook = field(default_factory=FirstLook, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_gradients", self.adjoint.of(self._value_for_two))

    @override
    def init(self, w: Tree, lam: Tree) -> InnerState:
        """The state before the first step: the weights and fresh slots; differentiable as the step is.

        Raises:
            ValueError: if a weight is not a floating-point tensor.
        """
        w = w.w if isinstance(w, Stacked) else w
        check_weights(w)
        return InnerState(w, self.optimizer.init(w), self.optimizer.steps_taken)

    @override
    def __call__(self, state: InnerState, lam: Tree, batch: Any) -> InnerState:
        if torch.is_grad_enabled() and (tree.requires_grad(state) or tree.requires_grad(lam)):
            return self._differentiable(state, lam, batch)
        return self.evaluate(state, lam, batch)[0]

    @override
    def evaluate(self, state: InnerState, lam: Tree, batch: Any) -> tuple[InnerState, Tensor | None]:
        """Φ and the inner loss on the way, which compiled steps do not give back. Cost: one gradient."""
        compilation = self._compilation(state, lam, batch)
        if compilation is not None and (new := compilation.next(state, lam, batch)) is not None:
            return new, None
        loss, g = self._value_and_gradient(state, lam, batch)
        with torch.no_grad():
            return self.next(g, state, lam), loss

    @override
    def linearize(self, state: InnerState, lam: Tree, batch: Any) -> Linearized:
        """Φ at this point with the graph of its gradient kept. Cost: one gradient.

        The graph lives as long as the result.

        Compiled, no graph is kept, and each pullback evaluates the gradient again.
        """
        compilation = self._compilation(state, lam, batch)
        if compilation is not None and compilation.refused is None:
            return CompiledPoint(compilation, state, lam, batch, lambda: self._graph(state, lam, batch))
        return self._graph(state, lam, batch)

    @override
    def stationary(self, state: InnerState, rate: float | None) -> Stationary:
        r"""Gradient descent of rate a on the same loss.

        .. math:: I - A = a H, \qquad B = -a\, \frac{\partial^2 L}{\partial w\, \partial\lambda}

        The fixed points of every optimiser here are those of gradient descent, and its :math:`A` is
        symmetric. Weight decay that the optimiser adds to the gradient is taken over.

        Raises:
            ValueError: if ``rate`` is ``None`` and the optimiser's learning rate is not a plain
                number that could serve; or if weight decay is decoupled.
        """
        if rate is None:
            rate = getattr(self.optimizer, "lr", None)
            if not isinstance(rate, (int, float)):
                raise ValueError(
                    "the inner learning rate is not a plain number, so it cannot serve as the Neumann series' rate: "
                    "give it, Neumann(terms, rate=0.01)"
                )
        rule = SGD(lr=float(rate), weight_decay=self.optimizer.loss_decay)
        descent = InnerStep(self.inner_loss, rule, self.adjoint, _look=self._look)
        return Stationary(descent, InnerState(state.w, {}, state.t), float(rate))

    @override
    def loss(self, w: Tree, lam: Tree, batch: Any) -> Tensor:
        return checked_scalar(self.inner_loss(w, lam, batch), "inner_loss")

    @override
    def adapt(self, state: InnerState, lam: Tree, batch: Any, alpha: Tree) -> tuple[Tree, Tree]:
        """``alpha · ∂w'/∂g``, element-wise, and ``alpha · ∂w'/∂λ`` at fixed g. Cost: one gradient.

        For gradient descent the first is ``-lr · alpha``.
        """
        _, g = self._value_and_gradient(state, lam, batch)
        cotangent = InnerState(alpha, None, state.t)
        u, _, _, lam_bar = pull_back(self.optimizer, g, state, tree.detach(lam), cotangent, "lam")
        return like(state.w, u), lam_bar

    def pure(self, w: Tree, slots: Tree, lam: Tree, batch: Any, numbers: tuple[int, ...]) -> tuple[Tree, Tree]:
        """Φ for a compiler to trace: the weights and slots after the step of this one number."""
        with sdpa_kernel(SDPBackend.MATH) if self._look.fused_attention else nullcontext():
            flat, spec = tree.flatten(torch.func.grad(self.loss)(w, lam, batch))
        for i in self._look.unreached:
            flat[i] = None
        return self.optimizer.update(tree.unflatten(flat, spec), w, slots, lam, numbers[0])

    def next(self, g: Tree, state: InnerState, lam: Tree) -> InnerState:
        """The optimiser's half of Φ."""
        w, slots = self.optimizer.update(g, state.w, state.slots, lam, state.t + 1)
        return InnerState(w, slots, state.t + 1)

    def compiled(self, backend: str) -> InnerStep:
        """The same step, compiled; see :func:`metaopt.compiled`."""
        return replace(self, compilation=Compilation(self.pure, backend))

    def __repr__(self) -> str:
        """The loss and the optimiser."""
        name = getattr(self.inner_loss, "__qualname__", repr(self.inner_loss))
        adjoint = "" if self.adjoint == ReverseOverReverse() else f", {self.adjoint!r}"
        return f"InnerStep({name}, {self.optimizer!r}{adjoint})"

    # -- parts -----------------------------------------------------------------------------------
    def _compilation(self, state: InnerState, lam: Tree, batch: Any) -> Compilation | None:
        """The compiled functions, where they were asked for; before their first use the loss is looked at."""
        if self.compilation is not None:
            self.look(state, lam, batch)
        return self.compilation

    def look(self, state: InnerState, lam: Tree, batch: Any) -> None:
        """Find out which weights the loss reaches, unless that is known. Cost, once: one gradient."""
        if not self._look.reached:
            with replay.preserved(state):
                self._value_and_gradient(state, lam, batch)

    def _value_and_gradient(self, state: InnerState, lam: Tree, batch: Any) -> tuple[Tensor, Tree]:
        """The loss and its gradient, both detached; ``None`` where the loss does not reach a weight."""
        with torch.enable_grad():
            w, leaves = tree.attached(state.w)
            loss = self._value(w, lam, batch)
            g = self._reached(gradient_of(loss, leaves, graph=False), w, lam, batch)
        return loss.detach(), like(w, g)

    def _differentiable(self, state: InnerState, lam: Tree, batch: Any) -> InnerState:
        """Φ with a graph through everything that requires grad."""
        w = tree.map(lambda x: x if x.requires_grad else x.detach().requires_grad_(), state.w)
        g = gradient_of(self._value_for_two(w, lam, batch), tree.leaves(w), graph=True)
        g = like(w, self._reached(g, w, lam, batch))
        if not self._look.twice:
            self._look.graph(g, w)
        return self.next(g, state._replace(w=w), lam)

    def _graph(self, state: InnerState, lam: Tree, batch: Any) -> LinearizedInnerStep:
        gradient = self._gradients.gradient(state.w, lam, batch)
        if not (self._look.twice and self._look.reached):
            self._reached(tree.leaves(gradient.g), state.w, lam, batch)
            self._look.graph(gradient.g, state.w)
        return LinearizedInnerStep(self.optimizer, gradient, state, lam)

    def _value_for_two(self, w: Tree, lam: Tree, batch: Any) -> Tensor:
        """The inner loss where it will be differentiated twice: attention then takes the kernel that can be."""
        if not self._look.written:
            rng = replay.snapshot(w)
            loss = self._value(w, lam, batch)
            if not self._look.fused_attention:
                return loss
            replay.restore(rng)
        if not self._look.fused_attention:
            return self._value(w, lam, batch)
        self._look.speak_of_attention()
        with sdpa_kernel(SDPBackend.MATH):
            return self._value(w, lam, batch)

    def _value(self, w: Tree, lam: Tree, batch: Any) -> Tensor:
        """The inner loss, which must leave the weights as they are."""
        if not self._look.written:
            loss = self._look.value(self.loss, w, lam, batch)
            self._look.optimizer(self.optimizer, w, lam)
            return loss
        leaves = tree.leaves(w)
        before = [x._version for x in leaves]
        loss = self.loss(w, lam, batch)
        after = [x._version for x in leaves]
        if after != before:
            raise written_into(w, [a != b for a, b in zip(after, before, strict=True)])
        return loss

    def _reached(self, g: list[Tensor | None], w: Tree, lam: Tree, batch: Any) -> list[Tensor | None]:
        """The gradient, after a look at which weights it reaches."""
        check_reached(g)
        if not self._look.reached:
            self._look.gradient(g, w, lambda: self._value(w, lam, batch))
        return g


def inner_of(step: Step, what: str) -> InnerStep:
    """The inner step inside its wrappers.

    Raises:
        TypeError: for a step that is not made by :func:`inner_step`; ``what`` is what asks for it.
    """
    inside = step
    while isinstance(inside, WrappedStep):
        inside = inside.step
    if not isinstance(inside, InnerStep):
        raise TypeError(f"{what} needs a step from mo.inner_step, got {type(inside).__name__}")
    return inside
