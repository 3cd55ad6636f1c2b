"""The outer loss: its value, and its gradient with respect to the weights and λ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from metaopt import tree
from metaopt.estimators.compiled_loss import CompiledLoss, ValueAndGradient
from metaopt.inner.contract import checked_scalar
from metaopt.tree import Tree

OuterLoss: TypeAlias = Callable[[Tree, Tree, Any], Tensor]
"""``outer_loss(w, lam, batch) -> scalar``."""


class OuterObjective(NamedTuple):
    """The outer loss together with the batch it is to be taken on."""

    loss: OuterLoss
    batch: Any

    def value(self, w: Tree, lam: Tree) -> Tensor:
        """``L_val(w, λ)`` without any graph."""
        with torch.no_grad():
            return checked_scalar(self.loss(w, lam, self.batch), "outer_loss").detach()


def outer_gradient(outer_loss: OuterLoss, w: Tree, lam: Tree, batch: Any) -> tuple[Tensor, Tree, Tree]:
    """``(L_val, ∂L_val/∂w, ∂L_val/∂λ)``; a leaf of λ that the outer loss does not see is ``None``.

    Raises:
        ValueError: if the loss is no scalar or depends on nothing.
        FloatingPointError: if it is not finite.
    """

    def eager() -> ValueAndGradient:
        return _value_and_gradient(outer_loss, w, lam, batch)

    loss, gradients = outer_loss.gradient(w, lam, batch, eager) if isinstance(outer_loss, CompiledLoss) else eager()
    if not bool(torch.isfinite(loss)):
        bad = tree.first_non_finite(w)
        where = (
            f"the weight {bad} is not finite: the inner run diverged (lower its learning rate)"
            if bad
            else "the weights are finite"
        )
        raise FloatingPointError(f"outer_loss is {loss.item()}; {where}")
    supply = iter(gradients)
    alpha, direct = tree.map(lambda x: next(supply) if tree.is_float(x) else None, (w, lam))
    return loss.detach(), tree.filled(alpha, w), direct


def _value_and_gradient(outer_loss: OuterLoss, w: Tree, lam: Tree, batch: Any) -> ValueAndGradient:
    with torch.enable_grad():
        w_, lam_ = tree.attach(w), tree.attach(lam)
        loss = checked_scalar(outer_loss(w_, lam_, batch), "outer_loss")
        if not loss.requires_grad:
            raise ValueError(
                "outer_loss depends neither on the weights nor on lam, or its graph was cut (detach, no_grad, "
                ".item(), argmax)"
            )
        gradients = torch.autograd.grad(loss, tree.floats((w_, lam_)), allow_unused=True)
        torch.clear_autocast_cache()  # as in the inner step
    return loss, gradients
