r"""``u · ∂²L/∂w∂λ`` by central differences of ``∇_λ L``: no second derivative is taken."""

from __future__ import annotations

import torch

from metaopt import tree
from metaopt.inner.contract import Step
from metaopt.trajectory import Moment
from metaopt.tree import Tree


def lam_gradient(step: Step, at: Moment) -> Tree:
    """``∂L/∂λ`` at fixed weights, with the step's random draws.

    A leaf that the loss does not see is ``None``.
    """
    with at.replayed(), torch.enable_grad():
        lam = tree.attach(at.lam)
        loss = step.loss(tree.detach(at.state.w), lam, at.batch)
        if not loss.requires_grad:
            return tree.map(lambda _: None, lam)
        flat, spec = tree.flatten(lam)
        return tree.unflatten(torch.autograd.grad(loss, flat, allow_unused=True), spec)


def mixed_difference(step: Step, at: Moment, u: Tree, radius: float) -> Tree:
    r"""The product of u with :math:`\partial^2 L / \partial w\, \partial\lambda`, by a central difference.

    .. math::
        \frac{\nabla_\lambda L(w + \epsilon u) - \nabla_\lambda L(w - \epsilon u)}{2\epsilon},
        \qquad \epsilon = r / \|u\|

    Error: :math:`O(r^2)` from the third derivative, plus rounding of relative size ``eps / r``.
    """
    size = tree.norm(u)
    size = torch.where(size > 0, size, torch.ones_like(size))
    epsilon = radius / size
    shift = tree.scale(epsilon, u)
    w = at.state.w
    above = lam_gradient(step, at.moved(tree.add(w, shift)))
    below = lam_gradient(step, at.moved(tree.sub(w, shift)))
    return tree.map(lambda a, b: None if a is None or b is None else (a - b) / (2 * epsilon), above, below)
