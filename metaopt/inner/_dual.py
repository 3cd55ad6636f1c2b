"""Forward mode through a gradient, with dual numbers."""

from __future__ import annotations

from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from metaopt import tree
from metaopt.inner.adjoint import Loss, Products
from metaopt.inner.reweighted import AsymmetricUpdateError
from metaopt.tree import Tree

# What torch says where an operation has no derivative of the kind that was asked for.
_MISSING = ("not implemented", "not been implemented", "double backward", "forward AD", "forward mode AD", "ZeroTensor")


def lacks_derivative(error: RuntimeError) -> bool:
    """Whether torch lacks a formula. Other errors, such as out of memory, belong to the caller."""
    return isinstance(error, AsymmetricUpdateError) or any(text in str(error) for text in _MISSING)


def tangent_of_gradient(
    loss: Loss, w: Tree, lam: Tree, batch: Any, u: list[Tensor], *, with_w: bool, with_lam: bool
) -> tuple[Products, Products]:
    """The derivative of ``(∇_w L, ∇_λ L)`` along ``(u, 0)``.

    Batches get a zero tangent. Without one, torch's in-place formulas for some losses (``mse_loss``)
    meet an immutable zero, and fail.
    """
    with torch.enable_grad(), forward_ad.dual_level():
        w_, w_leaves = tree.attached(w)
        lam_, lam_leaves = tree.attached(lam)
        dual = tree.unflatten(map(forward_ad.make_dual, w_leaves, u), tree.flatten(w_)[1])
        still = tree.map(lambda x: forward_ad.make_dual(x, torch.zeros_like(x)) if tree.is_float(x) else x, batch)
        inputs = (w_leaves if with_w else []) + (lam_leaves if with_lam else [])
        value = loss(dual, lam_, still)
        gradients = torch.autograd.grad(value, inputs, allow_unused=True) if inputs else ()
        torch.clear_autocast_cache()
        tangents = [None if g is None else _tangent(g) for g in gradients]
    split = len(w_leaves) if with_w else 0
    return tangents[:split], tangents[split:]


def _tangent(g: Tensor) -> Tensor | None:
    tangent = forward_ad.unpack_dual(g).tangent
    return None if tangent is None else tangent.detach().clone()
