"""The contract of a step Φ: what estimators see of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import Tensor
from typing_extensions import override

from metaopt import tree
from metaopt.inner.state import InnerState
from metaopt.tree import Tree

InnerLoss: TypeAlias = Callable[[Tree, Tree, Any], Tensor]
"""``inner_loss(w, lam, batch) -> scalar``."""

Wrt: TypeAlias = Literal["both", "state", "lam"]
"""Which products a pullback is asked for: ``αA`` ("state"), ``αB`` ("lam") or both.

What is not asked for is not computed.
"""


class Linearized(ABC):
    """Φ at one point, with its derivatives at hand.

    Φ is evaluated when the object is made, or when it is first asked for something, whichever is
    cheaper. Where the moment matters, ask for :attr:`state`.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def state(self) -> InnerState:
        """The state after the step, detached."""

    @property
    def loss(self) -> Tensor | None:
        """The inner loss here, detached; ``None`` where there is none, or it is not known."""
        return None

    @abstractmethod
    def pullback(
        self, cotangent: InnerState, wrt: Wrt = "both", *, last: bool = False
    ) -> tuple[InnerState | None, Tree]:
        """``(αA, αB)``; a leaf of λ that Φ does not depend on is ``None`` in αB.

        It can be called any number of times, until ``last`` gives the graph's memory back.
        """

    @abstractmethod
    def pushforward(
        self, state_dots: InnerState, lam_dots: Tree, *, columns_at_once: int | None = None, bound: float | None = None
    ) -> InnerState:
        """``A·state_dot + B·lam_dot`` for every column; any number of times.

        Args:
            state_dots: floating-point leaves ``[columns, *leaf.shape]``.
            lam_dots: a pytree like λ, with the same leading axis.
            columns_at_once: columns per batched product; 1: one product after the other; ``None``:
                :attr:`columns_at_once`.
            bound: elementwise bound on the tangents of the inner gradient (a biased safeguard), or
                ``None``.
        """

    @property
    @abstractmethod
    def columns_at_once(self) -> int:
        """How many columns to take in one batched product, by the size of the graph.

        Walks the graph: ask once per run.
        """

    @property
    @abstractmethod
    def products(self) -> int:
        """Second-order products that :meth:`pushforward` has taken so far."""


class WrappedLinearized(Linearized):
    """A linearised step around another one: it does the same, except for what the subclass changes."""

    __slots__ = ("_inner",)

    _inner: Linearized

    @property
    @override
    def state(self) -> InnerState:
        return self._inner.state

    @property
    @override
    def loss(self) -> Tensor | None:
        return self._inner.loss

    @property
    @override
    def columns_at_once(self) -> int:
        return self._inner.columns_at_once

    @property
    @override
    def products(self) -> int:
        return self._inner.products


class Stationary(NamedTuple):
    """What implicit differentiation sees of Φ.

    Attributes:
        step: a step whose fixed points solve the inner problem.
        state: the state as that step sees it.
        rate: how far it goes along the gradient: ``w - step(w) = rate · ∇_w L`` (1 for a custom Φ).
        symmetric: whether its derivative is symmetric, as gradient descent's is.
    """

    step: Step
    state: InnerState
    rate: float
    symmetric: bool = True


class Step(ABC):
    """What estimators see of Φ: :meth:`init`, a call, and :meth:`linearize`. The rest follows from these.

    :meth:`loss`, :meth:`adapt` and :meth:`stationary` are for steps that apply an optimiser to an
    inner loss. Any other step refuses them by name.
    """

    @abstractmethod
    def init(self, w: Tree, lam: Tree) -> InnerState:
        """The state before the first step."""

    @abstractmethod
    def __call__(self, state: InnerState, lam: Tree, batch: Any) -> InnerState:
        """Φ(state, λ; batch): one inner step."""

    @abstractmethod
    def linearize(self, state: InnerState, lam: Tree, batch: Any) -> Linearized:
        """Φ with its derivatives at hand."""

    # -- written once ----------------------------------------------------------------------------
    def evaluate(self, state: InnerState, lam: Tree, batch: Any) -> tuple[InnerState, Tensor | None]:
        """Φ and the inner loss on the way, where there is one; both detached."""
        return self(state, lam, batch), None

    def vjp(
        self, state: InnerState, lam: Tree, batch: Any, cotangent: InnerState, *, wrt: Wrt = "both"
    ) -> tuple[InnerState | None, Tree]:
        """The step adjoint ``(αA, αB)``. Cost: one gradient, and one contraction of its graph."""
        return self.linearize(state, lam, batch).pullback(cotangent, wrt, last=True)

    def jvp(self, state: InnerState, lam: Tree, batch: Any, state_dot: InnerState, lam_dot: Tree) -> InnerState:
        """The tangent ``A·state_dot + B·lam_dot``.

        Cost: one gradient with its graph, and one product of it.
        """
        columns = tree.map(lambda x: x.unsqueeze(0) if tree.is_float(x) else x, (state_dot, lam_dot))
        dots = self.linearize(state, lam, batch).pushforward(*columns, columns_at_once=1)
        return tree.map(lambda x: x[0] if tree.is_float(x) else x, dots)

    def steps_in(self, batch: Any) -> int:
        """How many inner steps Φ takes on this batch."""
        return 1

    @property
    def steps_at_once(self) -> int | None:
        """How many batches a run hands over at a time; ``None``: one, and not in a list."""
        return None

    @property
    def stacked(self) -> bool:
        """Whether every weight has a task axis first (:func:`metaopt.vmapped`, :func:`metaopt.looped`)."""
        return False

    @property
    def undeclared(self) -> list[str]:
        """What was seen, at the first steps, of tensors that require grad and are neither weights nor λ."""
        return []

    # -- for inner steps only --------------------------------------------------------------------
    def loss(self, w: Tree, lam: Tree, batch: Any) -> Tensor:
        """The inner loss, for methods that are built from it alone.

        Differentiable where its inputs require grad.
        """
        raise self._refusal("inner loss")

    def adapt(self, state: InnerState, lam: Tree, batch: Any, alpha: Tree) -> tuple[Tree, Tree]:
        """The optimiser's half of the adjoint.

        The cotangent ``u = alpha · ∂w'/∂g`` of the inner gradient, and λ's own part or ``None``.
        """
        raise self._refusal("optimiser")

    def stationary(self, state: InnerState, rate: float | None) -> Stationary:
        """A step whose fixed points solve the inner problem (for implicit differentiation)."""
        raise self._refusal("fixed-point map")

    def _refusal(self, what: str) -> TypeError:
        return TypeError(
            f"{type(self).__name__} has no {what} that this estimator could use: build the step with mo.inner_step, "
            "or use OneStep, RMD or PES"
        )


class WrappedStep(Step):
    """A step around another one: it does the same, except for what the subclass changes.

    Attributes:
        step: the step inside.
    """

    step: Step

    @abstractmethod
    def around(self, step: Step) -> Step:
        """The same around another step."""

    @override
    def init(self, w: Tree, lam: Tree) -> InnerState:
        return self.step.init(w, lam)

    @override
    def __call__(self, state: InnerState, lam: Tree, batch: Any) -> InnerState:
        return self.step(state, lam, batch)

    @override
    def evaluate(self, state: InnerState, lam: Tree, batch: Any) -> tuple[InnerState, Tensor | None]:
        return self.step.evaluate(state, lam, batch)

    @override
    def steps_in(self, batch: Any) -> int:
        return self.step.steps_in(batch)

    @property
    @override
    def steps_at_once(self) -> int | None:
        return self.step.steps_at_once

    @property
    @override
    def stacked(self) -> bool:
        return self.step.stacked

    @property
    @override
    def undeclared(self) -> list[str]:
        return self.step.undeclared

    @override
    def loss(self, w: Tree, lam: Tree, batch: Any) -> Tensor:
        return self.step.loss(w, lam, batch)

    @override
    def adapt(self, state: InnerState, lam: Tree, batch: Any, alpha: Tree) -> tuple[Tree, Tree]:
        return self.step.adapt(state, lam, batch, alpha)

    @override
    def stationary(self, state: InnerState, rate: float | None) -> Stationary:
        found = self.step.stationary(state, rate)
        return found._replace(step=self.around(found.step))


def checked_scalar(loss: Any, what: str) -> Tensor:
    """``loss`` if it is a scalar tensor.

    Raises:
        TypeError: if it is not a tensor.
        ValueError: if it is not a scalar.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"{what} must return a scalar tensor, got {type(loss).__name__}")
    if loss.ndim != 0:
        raise ValueError(
            f"{what} must return a scalar, got a tensor of shape {tuple(loss.shape)}: reduce it with .mean() or .sum()"
        )
    return loss


def check_weights(w: Tree) -> None:
    """Raise a ``ValueError`` that names the first weight which is not a floating-point tensor."""
    flat = tree.leaves(w)
    if not flat:
        raise ValueError("w has no leaves: there are no weights to train")
    for i, leaf in enumerate(flat):
        if not tree.is_float(leaf):
            kind = f"a tensor of {leaf.dtype}" if isinstance(leaf, Tensor) else type(leaf).__name__
            raise ValueError(
                f"the weight {tree.names(w)[i]} is {kind}; weights are floating-point tensors (pass anything else "
                "through the batch)"
            )
