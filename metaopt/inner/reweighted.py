r"""Losses whose weights the update takes as constants, although they depend on the losses themselves.

Reweighting methods compute the weights :math:`v_i = V_i(\ell; \lambda)` of a batch from its losses,
and update with

.. math::
    g(w, \lambda) = \sum_i v_i(\ell(w); \lambda)\, \nabla_w \ell_i(w), \qquad
    \frac{\partial g}{\partial w} = \sum_i v_i \nabla^2 \ell_i
        + \sum_{ij} \nabla \ell_i\, \frac{\partial v_i}{\partial \ell_j}\, \nabla \ell_j^\top

:math:`g` is not the gradient of :math:`\sum_i v_i \ell_i`, which has further terms. With a detached
:math:`v`, g is right, but every hypergradient through the update loses the second sum, without any
error. Here g is right and so is its derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class AsymmetricUpdateError(RuntimeError):
    """A product relied on symmetric second derivatives, which only an update that is a gradient has."""


def reweighted(losses: Tensor, weigh: Callable[[Tensor], Tensor]) -> Tensor:
    """``weigh(losses) * losses``, to be summed: constant weights in the update, exact ones in its derivatives.

    The gradient with respect to anything else that ``weigh`` holds (λ) is that of the products at
    the given losses. Cost: ``weigh`` twice.

    Reverse products of the update are exact. ``InnerStep.jvp`` takes its slower form, and forward
    over reverse is refused. Methods that difference ``∂L/∂λ`` between two points (``DARTS``,
    ``SAMA``) rely on symmetry, and see one term more.

    The Jacobian is symmetric where ``v_i`` depends on its own loss only. It is not where weights
    are normalised over the batch; implicit differentiation then needs a solver for matrices that
    are not symmetric, such as GMRES.

    Args:
        losses: one per example, ``[n]``.
        weigh: losses to weights, ``[n] -> [n]``.

    >>> losses = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> g = torch.autograd.grad(reweighted(losses, lambda x: x**2).sum(), losses, create_graph=True)[0]
    >>> g, torch.autograd.grad(g.sum(), losses)[0]
    (tensor([1., 4.], grad_fn=...), tensor([2., 4.]))
    """
    return _Reweighted.apply(losses, weigh(losses), weigh(losses.detach()))  # pyright: ignore[reportReturnType]


class _Reweighted(torch.autograd.Function):
    """``held * losses``, and its first derivatives.

    The derivative is ``held`` with respect to the losses, and the losses with respect to
    ``weights``. With respect to ``held`` there is none, but ``held`` keeps its graph.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(losses: Tensor, held: Tensor, weights: Tensor) -> Tensor:
        return held * losses

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        losses, held, _ = inputs
        ctx.save_for_backward(losses, held)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor]:
        losses, held = ctx.saved_tensors
        return grads[0] * held, None, _OnceDifferentiable.apply(grads[0] * losses)  # pyright: ignore[reportReturnType]


class _OnceDifferentiable(torch.autograd.Function):
    """The identity, whose own derivative is an error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise AsymmetricUpdateError(
            "the gradient with respect to lam of a reweighted loss was differentiated again: its derivative is not "
            "the transpose of the update's. Take products with the update's own derivative, as InnerStep.vjp and "
            "InnerStep.jvp do"
        )
