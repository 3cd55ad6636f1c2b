"""Reverse over reverse: one contraction of the gradient's own graph."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaopt import tree
from metaopt.inner import _engine
from metaopt.inner._dual import lacks_derivative, tangent_of_gradient
from metaopt.inner.adjoint import Loss, Products, check_reached, gradient_of, like
from metaopt.tree import Tree


@dataclass(frozen=True)
class ReverseOverReverse:
    r"""One contraction of the gradient's own graph.

    .. math:: u^\top \frac{\partial g}{\partial (w, \lambda)}, \qquad g = \nabla_w L(w, \lambda)

    The default, which is faster and smaller on a CPU (see ``benchmarks/README.md``).

    Cost: a product is about two gradients. Memory: the graph of one gradient. Bias: exact.

    Where an operation has no second derivative, :class:`ForwardOverReverse` is tried, and a warning
    says so.

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(
    ...     lambda w, lam, _: 0.5 * ((w - lam) ** 2).sum(), mo.optim.SGD(lr=0.5), adjoint=mo.inner.ReverseOverReverse()
    ... )
    >>> problem = mo.Problem(step, lambda w, lam, _: w.sum(), torch.zeros(1), torch.ones(1), [None] * 2)
    >>> problem.hypergradient(mo.RMD()).total  # exact: 1 - (1 - 0.5)²
    tensor([0.7500])
    """

    def of(self, loss: Loss) -> GraphGradients:
        """The mode at work on this loss."""
        return GraphGradients(loss)


class GraphGradients:
    """:class:`ReverseOverReverse` at work on one loss."""

    __slots__ = ("_loss",)

    def __init__(self, loss: Loss) -> None:
        self._loss = loss

    def gradient(self, w: Tree, lam: Tree, batch: Any) -> GradientGraph:
        """The inner loss at a point; its gradient comes when it is first asked for."""
        return GradientGraph(self._loss, w, lam, batch)


class GradientGraph:
    """The gradient with its graph.

    The loss is evaluated here, its gradient when it is first asked for: the one with respect to
    ``w``, or that with respect to ``(w, λ)``, whose parts share a graph.
    """

    __slots__ = ("_batch", "_lam", "_loss", "_of_lam", "_of_w", "_root", "_w", "inputs")

    def __init__(self, loss: Loss, w: Tree, lam: Tree, batch: Any) -> None:
        self._w, w_leaves = tree.attached(w)
        self._lam, lam_leaves = tree.attached(lam)
        self._loss = loss
        self._batch = batch
        self.inputs = (w_leaves, lam_leaves)
        with torch.enable_grad():
            self._root: Tensor | None = loss(self._w, self._lam, batch)
        self._of_w: list[Tensor | None] | None = None
        self._of_lam: list[Tensor | None] | None = None

    @property
    def value(self) -> Tensor:
        """The inner loss, while its graph lives."""
        assert self._root is not None
        return self._root.detach()

    @property
    def g(self) -> Tree:
        """The gradient ``∇_w L`` with its graph."""
        return like(self._w, self._gradient())

    def joint(self) -> list[Tensor | None]:
        """``(∇_w L, ∇_λ L)``. Cost: one gradient, or only the part that has not been taken yet."""
        w, lam = self.inputs
        if self._of_w is None:
            found = self._derivative([*w, *lam])
            self._of_w = found[: len(w)]
            self._of_lam = found[len(w) :]
        if self._of_lam is None:
            self._of_lam = self._derivative(lam) if lam else []
        return self._of_w + self._of_lam

    def contract(
        self, u: list[Tensor], *, with_w: bool, with_lam: bool, last: bool = False
    ) -> tuple[Products, Products]:
        """One backward pass through the gradient's graph, which stays unless this is the last."""
        w = self.inputs[0] if with_w else []
        lam = self.inputs[1] if with_lam else []
        live = [(g, seed) for g, seed in zip(self._gradient(), u, strict=True) if g is not None and g.requires_grad]
        if last:
            self._root = None
        products: Any = [None] * (len(w) + len(lam))
        if live and products:
            try:
                products = _engine.products(
                    [g for g, _ in live], w + lam, [seed for _, seed in live], retain_graph=not last
                )
            except RuntimeError as error:
                return self._otherwise(error, u, with_w=with_w, with_lam=with_lam)
        return list(products[: len(w)]), list(products[len(w) :])

    def graph(self) -> GradientGraph:
        """The gradient itself, which has its graph already."""
        return self

    # -- parts -----------------------------------------------------------------------------------
    def _gradient(self) -> list[Tensor | None]:
        if self._of_w is None:
            self._of_w = self._derivative(self.inputs[0])
            check_reached(self._of_w)
        return self._of_w

    def _derivative(self, leaves: list[Tensor]) -> list[Tensor | None]:
        assert self._root is not None  # the last product has been taken, and its graph is gone
        with torch.enable_grad():
            return gradient_of(self._root, leaves, graph=True)

    def _otherwise(
        self, error: RuntimeError, u: list[Tensor], *, with_w: bool, with_lam: bool
    ) -> tuple[Products, Products]:
        if not lacks_derivative(error):
            raise error
        try:
            products = tangent_of_gradient(
                self._loss, self._w, self._lam, self._batch, u, with_w=with_w, with_lam=with_lam
            )
        except RuntimeError as other:
            if not lacks_derivative(other):
                raise
            raise RuntimeError(
                f"an operation of inner_loss has no second derivative in either mode (reverse: {first_line(error)}; "
                f"forward: {first_line(other)}). " + (_COMPILED if "torch.compile" in str(error) else _FUSED)
            ) from error
        warnings.warn(
            f"reverse over reverse is impossible here ({first_line(error)}); using forward over reverse instead",
            UserWarning,
            stacklevel=2,
        )
        return products


def first_line(error: Exception) -> str:
    """What an error says, without its trace."""
    return str(error).split("\n")[0]


_FUSED = "Use another form of it: for attention, run the loss under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
_COMPILED = "What torch.compile made cannot be differentiated twice: give the loss what it was made from"
