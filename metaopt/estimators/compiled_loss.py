"""The outer loss and its gradient as one compiled function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from metaopt import tree
from metaopt.inner.compiled import Compiled
from metaopt.tree import Tree

ValueAndGradient: TypeAlias = tuple[Tensor, Sequence[Tensor | None]]


class CompiledLoss(Compiled):
    r"""An outer loss whose value and gradient are one compiled function; called, it is the loss it was. Built by :func:`compiled_loss`.

    .. math::
        (w, \lambda) \mapsto \left(L, \frac{\partial L}{\partial w}, \frac{\partial L}{\partial \lambda}\right)

    Attributes:
        unused: which leaves of ``(w, λ)`` it does not depend on; ``None`` before the first
            gradient.
    """

    def __init__(self, loss: Callable[[Tree, Tree, Any], Tensor], backend: str) -> None:
        """Nothing is compiled yet."""
        super().__init__("the outer loss", backend, dynamic=False)
        self.loss = loss
        self.unused: list[bool] | None = None

    def __call__(self, w: Tree, lam: Tree, batch: Any) -> Tensor:
        """The loss itself, eager and differentiable."""
        return self.loss(w, lam, batch)

    def gradient(self, w: Tree, lam: Tree, batch: Any, eager: Callable[[], ValueAndGradient]) -> ValueAndGradient:
        """``L`` and its gradient by every float leaf of ``(w, λ)``, ``None`` where it plays no part.

        That is found out by ``eager``, once.
        """
        out = None if self.unused is None else self._run("gradient", self._value_and_gradient, w, lam, batch)
        if out is None:
            value, gradients = eager()
            self.unused = [g is None for g in gradients]
            return value, gradients
        return out[0], [
            None if missing and not bool(g.any()) else g for g, missing in zip(out[1:], self.unused or [], strict=True)
        ]

    def _value_and_gradient(self, w: Tree, lam: Tree, batch: Any) -> tuple[Tensor, ...]:
        flat = tree.floats((w, lam))

        def loss(*values: Tensor) -> Tensor:
            supply = iter(values)
            w_, lam_ = tree.map(lambda x: next(supply) if tree.is_float(x) else x, (w, lam))
            return self.loss(w_, lam_, batch)

        gradients, value = torch.func.grad_and_value(loss, argnums=tuple(range(len(flat))))(*flat)
        return (value, *gradients)


def compiled_loss(outer_loss: Callable[[Tree, Tree, Any], Tensor], backend: str = "inductor") -> CompiledLoss:
    """The same outer loss, whose value and gradient are compiled where an estimator asks for them.

    What ``inner_step(..., compile=True)`` is to the inner step. The first two calls are eager and
    compiling (seconds: ``.seconds``); what cannot be compiled runs eagerly, and a warning says why.
    Values agree to rounding.

    Args:
        outer_loss: ``(w, lam, batch) -> scalar``.
        backend: of :func:`torch.compile`.

    Raises:
        TypeError: if the loss is no function.
    """
    if not callable(outer_loss):
        raise TypeError(f"outer_loss must be a function (w, lam, batch) -> scalar, got {type(outer_loss).__name__}")
    return CompiledLoss(outer_loss, backend)
