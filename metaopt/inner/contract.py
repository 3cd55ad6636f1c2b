"""The contract of a step Φ: what estimators see of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from metaopt import tree
from metaopt.inner.state import InnerState
from metaopt.inner.tangents import Tangents
from metaopt.tree import Tree

InnerLoss: TypeAlias = Callable[[Tree, Tree, Any], Tensor]
"""``inner_loss(w, lam, batch) -> scalar``."""

Wrt: TypeAlias = Literal["both", "state", "lam"]
"""Which products a pullback is asked for: ``αA`` ("state"), ``αB`` ("lam") or both.

What is not asked for is not computed.
"""


class Linearized(Protocol):
    """Φ at one point, with the graph of its gradient kept."""

    @property
    def state(self) -> InnerState:
        """Φ(state, λ; batch)."""
        ...

    def pullback(self, cotangent: InnerState, wrt: Wrt = "both") -> tuple[InnerState | None, Tree]:
        """``(αA, αB)``; a leaf of λ that Φ does not depend on is ``None`` in αB. Can be called any number of times."""
        ...


class Stationary(NamedTuple):
    """What implicit differentiation sees of Φ.

    Attributes:
        step: a step whose fixed points solve the inner problem.
        state: the state as that step sees it.
        rate: how far it goes along the gradient: ``w - step(w) = rate · ∇_w L`` (1 for a custom Φ).
    """

    step: Step
    state: InnerState
    rate: float


class Step(Protocol):
    """What estimators see of Φ."""

    def init(self, w: Tree, lam: Tree) -> InnerState:
        """The state before the first step."""
        ...

    def __call__(self, state: InnerState, lam: Tree, batch: Any) -> InnerState:
        """Φ."""
        ...

    def linearize(self, state: InnerState, lam: Tree, batch: Any) -> Linearized:
        """Φ with its derivative at hand."""
        ...

    def vjp(
        self, state: InnerState, lam: Tree, batch: Any, cotangent: InnerState, *, wrt: Wrt = "both"
    ) -> tuple[InnerState | None, Tree]:
        """The step adjoint."""
        ...

    def jvp(self, state: InnerState, lam: Tree, batch: Any, state_dot: InnerState, lam_dot: Tree) -> InnerState:
        """The step's tangent map."""
        ...

    def tangents(self, state: InnerState, lam: Tree, batch: Any) -> Tangents:
        """Φ with its tangent map at hand, for many tangents at one point."""
        ...

    def stationary(self, state: InnerState, rate: float | None) -> Stationary:
        """A step whose fixed points solve the inner problem (for implicit differentiation)."""
        ...

    def loss(self, w: Tree, lam: Tree, batch: Any) -> Tensor:
        """The inner loss, for methods that are built from it alone; differentiable where its inputs require grad."""
        ...

    def adapt(self, state: InnerState, lam: Tree, batch: Any, alpha: Tree) -> tuple[Tree, Tree]:
        """The optimiser's half of the adjoint.

        The cotangent ``u = alpha · ∂w'/∂g`` of the inner gradient, and λ's own part or ``None``.
        """
        ...


@runtime_checkable
class StepAtSeveral(Protocol):
    """A step that may be linearised at several points in one call of autograd.

    On tiny nets the calls are what it costs.
    """

    def linearize_each(self, points: Iterable[tuple[InnerState, Any]], lam: Tree) -> Sequence[Linearized] | None:
        """Φ at each ``(state, batch)``, for one pullback each, which gives its graph's memory back.

        ``None`` if there is nothing to win by it.

        The inner loss is evaluated at a point before the next is asked for.
        """
        ...


def checked_scalar(loss: Any, what: str) -> Tensor:
    """``loss`` if it is a scalar tensor.

    Raises:
        TypeError: if it is no tensor.
        ValueError: if it is no scalar.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"{what} must return a scalar tensor, got {type(loss).__name__}")
    if loss.ndim != 0:
        raise ValueError(
            f"{what} must return a scalar, got a tensor of shape {tuple(loss.shape)}: reduce it with .mean() or .sum()"
        )
    return loss


def check_weights(w: Tree) -> None:
    """Raise a ``ValueError`` that names the first weight which is no floating-point tensor."""
    flat = tree.leaves(w)
    if not flat:
        raise ValueError("w has no leaves: there are no weights to train")
    for name, leaf in zip(tree.names(w), flat, strict=True):
        if not tree.is_float(leaf):
            kind = f"a tensor of {leaf.dtype}" if isinstance(leaf, Tensor) else type(leaf).__name__
            raise ValueError(
                f"the weight {name} is {kind}; weights are floating-point tensors (pass anything else through the "
                "batch)"
            )
