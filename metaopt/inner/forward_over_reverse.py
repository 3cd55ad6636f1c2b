"""Forward over reverse: the "mixed mode" of MixFlow-MG."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaopt import replay, tree
from metaopt.inner._dual import lacks_derivative, tangent_of_gradient
from metaopt.inner._graph import check_twice_differentiable
from metaopt.inner.adjoint import Gradient, Loss, Products, check_reached, gradient_of, like
from metaopt.inner.reverse_over_reverse import GradientGraph, first_line
from metaopt.tree import Tree


@dataclass(frozen=True)
class ForwardOverReverse:
    r"""The forward-mode derivative of the gradient along :math:`(u, 0)`, by symmetry of second derivatives.

    .. math:: u^\top \frac{\partial^2 L}{\partial w\, \partial (w, \lambda)} =
        \frac{d}{d\epsilon} \nabla_{(w, \lambda)} L(w + \epsilon u, \lambda)

    Kemaev et al. 2025, "MixFlow-MG", `arXiv 2505.00793 <https://arxiv.org/abs/2505.00793>`__.

    Cost: a product is about two gradients. Nothing is shared with the gradient itself, so a step
    adjoint takes one gradient more than :class:`ReverseOverReverse`. Memory: activations and their
    tangents, and no graph of a backward pass. Bias: exact.

    Random draws are repeated. Where an operation has no forward derivative (GroupNorm, SiLU, Huber,
    attention, …), that step uses :class:`ReverseOverReverse` from then on, and a warning says so
    once.

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(
    ...     lambda w, lam, _: 0.5 * ((w - lam) ** 2).sum(), mo.optim.SGD(lr=0.5), adjoint=mo.inner.ForwardOverReverse()
    ... )
    >>> problem = mo.Problem(step, lambda w, lam, _: w.sum(), torch.zeros(1), torch.ones(1), [None] * 2)
    >>> problem.hypergradient(mo.RMD()).total  # exact: 1 - (1 - 0.5)²
    tensor([0.7500])
    """

    def of(self, loss: Loss) -> MixedGradients:
        """The mode at work on this loss."""
        return MixedGradients(loss)


class MixedGradients:
    """:class:`ForwardOverReverse` at work on one loss.

    Attributes:
        loss: the loss.
        refused: why forward mode is impossible; ``None`` as long as it is not.
    """

    __slots__ = ("loss", "refused")

    def __init__(self, loss: Loss) -> None:
        self.loss = loss
        self.refused: str | None = None

    def gradient(self, w: Tree, lam: Tree, batch: Any) -> Gradient:
        """The gradient at a point, without its graph. Cost: one gradient."""
        if self.refused is not None:
            return GradientGraph(self.loss, w, lam, batch)
        return GradientPoint(self, w, lam, batch)

    def refuse(self, error: RuntimeError) -> None:
        """Remember that forward mode is impossible, and say so."""
        self.refused = first_line(error)
        warnings.warn(
            f"forward over reverse is impossible here ({self.refused}); using reverse over reverse instead",
            UserWarning,
            stacklevel=3,
        )


class GradientPoint:
    """The gradient and where it was taken."""

    __slots__ = ("_at", "_mode", "_rng", "g", "value")

    def __init__(self, mode: MixedGradients, w: Tree, lam: Tree, batch: Any) -> None:
        self._mode = mode
        self._at = (w, lam, batch)
        self._rng = replay.snapshot(w)
        with torch.enable_grad():
            w_, leaves = tree.attached(w)
            root = mode.loss(w_, tree.detach(lam), batch)
            gradients = gradient_of(root, leaves, graph=False)
        check_reached(gradients)
        self.g = like(w, gradients)
        self.value = root.detach()

    def contract(
        self, u: list[Tensor], *, with_w: bool, with_lam: bool, last: bool = False
    ) -> tuple[Products, Products]:
        """One forward-mode derivative of one gradient."""
        if self._mode.refused is None:
            try:
                with replay.repeated(self._rng):
                    return tangent_of_gradient(self._mode.loss, *self._at, u, with_w=with_w, with_lam=with_lam)
            except RuntimeError as error:
                if not lacks_derivative(error):
                    raise
                self._mode.refuse(error)
        return self.graph().contract(u, with_w=with_w, with_lam=with_lam, last=True)

    def graph(self) -> GradientGraph:
        """The gradient computed again, with its graph. Cost: one gradient."""
        with replay.repeated(self._rng):
            graph = GradientGraph(self._mode.loss, *self._at)
        check_twice_differentiable(tree.leaves(graph.g))
        return graph
