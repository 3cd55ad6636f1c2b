"""The outer loss: its value, and its gradient with respect to the weights and λ."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaopt import tree
from metaopt.estimators.compiled import CompiledLoss, OuterLoss, ValueAndGradient
from metaopt.inner._first_look import said_of_undeclared, warn_of
from metaopt.inner._graph import nodes
from metaopt.inner.contract import checked_scalar
from metaopt.tree import Tree


class OuterObjective(NamedTuple):
    """The outer loss together with the batch it is to be taken on.

    Attributes:
        loss: the outer loss.
        batch: its batch.
        look: whether to look at what else the loss depends on, which is done once a run.
    """

    loss: OuterLoss
    batch: Any
    look: bool = False

    def gradient(self, w: Tree, lam: Tree, *, needs_weights: bool = True) -> tuple[Tensor, Tree, Tree]:
        """The value and both gradients; see :func:`outer_gradient`."""
        return outer_gradient(self.loss, w, lam, self.batch, needs_weights=needs_weights, look=self.look)

    def value(self, w: Tree, lam: Tree) -> Tensor:
        """``L_val(w, λ)`` without any graph."""
        with torch.no_grad():
            return checked_scalar(self.loss(w, lam, self.batch), "outer_loss").detach()


def outer_gradient(
    outer_loss: OuterLoss, w: Tree, lam: Tree, batch: Any, *, needs_weights: bool = True, look: bool = False
) -> tuple[Tensor, Tree, Tree]:
    """``(L_val, ∂L_val/∂w, ∂L_val/∂λ)``; a leaf of λ that the outer loss does not see is ``None``.

    Raises:
        ValueError: if the loss is not a scalar, depends on nothing, or, where ``needs_weights``, not
            on the weights.
        FloatingPointError: if it is not finite.

    Warns:
        UndeclaredTensorWarning: where ``look``, if it depends on other tensors that require grad.
    """

    def eager() -> ValueAndGradient:
        return _value_and_gradient(outer_loss, w, lam, batch, look)

    loss, gradients = outer_loss.gradient(w, lam, batch, eager) if isinstance(outer_loss, CompiledLoss) else eager()
    if not bool(torch.isfinite(loss)):
        bad = tree.first_non_finite(w)
        where = f"the weight {bad} is not finite" if bad else "the weights are finite"
        raise FloatingPointError(f"outer_loss is {loss.item()}; {where}")
    if needs_weights and all([g is None for g in gradients[: len(tree.floats(w))]]):
        raise ValueError(
            "outer_loss does not depend on the weights it is given, so that nothing would be learned from the inner "
            "run: call model(w, x), not net(x), and check for detach or no_grad. If only the direct term is meant, use "
            "mo.FirstOrder()"
        )
    supply = iter(gradients)
    alpha, direct = tree.map(lambda x: next(supply) if tree.is_float(x) else None, (w, lam))
    return loss.detach(), tree.filled(alpha, w), direct


def _value_and_gradient(outer_loss: OuterLoss, w: Tree, lam: Tree, batch: Any, look: bool) -> ValueAndGradient:
    with torch.enable_grad():
        w_, w_leaves = tree.attached(w)
        lam_, lam_leaves = tree.attached(lam)
        known = w_leaves + lam_leaves
        loss = checked_scalar(outer_loss(w_, lam_, batch), "outer_loss")
        if not loss.requires_grad:
            raise ValueError(
                "outer_loss depends neither on the weights nor on lam, or its graph was cut (detach, no_grad, "
                ".item(), argmax)"
            )
        if look:
            warn_of(said_of_undeclared(nodes([loss]), known, "outer_loss"))
        gradients = torch.autograd.grad(loss, known, allow_unused=True)
        torch.clear_autocast_cache()  # as in the inner step
    return loss, gradients
