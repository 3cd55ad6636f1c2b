r"""``u · ∂²L/∂w∂λ`` by central differences of ``∇_λ L``: no second derivative is taken."""

from __future__ import annotations

from typing import Any

import torch

from metaopt import replay, tree
from metaopt.inner.contract import Step
from metaopt.replay import Rng
from metaopt.tree import Tree


def lam_gradient(step: Step, w: Tree, lam: Tree, batch: Any, rng: Rng) -> Tree:
    """``∂L/∂λ`` at fixed weights, with the random draws of ``rng``; a leaf that the loss does not see is ``None``."""
    with replay.preserved(w), torch.enable_grad():
        replay.restore(rng)
        lam_ = tree.attach(lam)
        loss = step.loss(tree.detach(w), lam_, batch)
        if not loss.requires_grad:
            return tree.map(lambda _: None, lam)
        flat, spec = tree.flatten(lam_)
        return tree.unflatten(torch.autograd.grad(loss, flat, allow_unused=True), spec)


def mixed_difference(step: Step, w: Tree, lam: Tree, batch: Any, rng: Rng, u: Tree, radius: float) -> Tree:
    r""":math:`[\nabla_\lambda L(w + \epsilon u) - \nabla_\lambda L(w - \epsilon u)] / 2\epsilon` with :math:`\epsilon = r / \|u\|`.

    Error: :math:`O(r^2)` from the third derivative, plus rounding of relative size ``eps / r``.
    """
    size = tree.norm(u)
    epsilon = radius / torch.where(size > 0, size, torch.ones_like(size))
    shift = tree.scale(epsilon, u)
    above = lam_gradient(step, tree.add(w, shift), lam, batch, rng)
    below = lam_gradient(step, tree.sub(w, shift), lam, batch, rng)
    return tree.map(lambda a, b: None if a is None or b is None else (a - b) / (2 * epsilon), above, below)
