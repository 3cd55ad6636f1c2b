r"""What an estimator is, and the one call that uses it.

.. math::
    \frac{d L_{val}}{d\lambda} = \underbrace{\frac{\partial L_{val}}{\partial \lambda}}_{\text{direct}}
      + \underbrace{\alpha_t \frac{d w_t}{d\lambda}}_{\text{indirect}}, \qquad \alpha_t = \frac{\partial L_{val}}{\partial w_t}

Every estimator is an approximation (or not) of the linear map :math:`\alpha \mapsto \alpha\, dw_t/d\lambda`, the response pullback.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor
from typing_extensions import Self

from metaopt import tree
from metaopt.estimators.compiled_loss import CompiledLoss, ValueAndGradient
from metaopt.estimators.cost import Cost, CountedStep
from metaopt.inner.state import InnerState
from metaopt.inner.step import Step, checked_scalar
from metaopt.tree import Tree

OuterLoss: TypeAlias = Callable[[Tree, Tree, Any], Tensor]
"""``outer_loss(w, lam, batch) -> scalar``."""

Batches: TypeAlias = Sequence[Any] | Callable[[int], Any]
"""A sequence, or ``t -> batch`` for t = 1 … T together with ``horizon=T``."""


class UnusedHyperparameterWarning(UserWarning):
    """Part of λ influences neither the inner run nor the outer loss; its hypergradient is zero."""


class ZeroHypergradientWarning(UserWarning):
    """The estimator drops the indirect term and the outer loss does not see λ, so the hypergradient is zero by construction."""


class Response(NamedTuple):
    """What a pullback returns.

    Attributes:
        lam: ``α · dw_t/dλ``, a pytree like λ; a leaf that Φ does not depend on is ``None``.
        init: ``α · dw_t/dw_0``, where the method has it.
        info: what the method reports about itself (the linear solver's :class:`~metaopt.linsolve.Solution`), if anything.
    """

    lam: Tree
    init: Tree | None = None
    info: Any = None


Pullback: TypeAlias = Callable[[Tree], Response]


class OuterObjective(NamedTuple):
    """The outer loss together with the batch it is to be taken on."""

    loss: OuterLoss
    batch: Any

    def value(self, w: Tree, lam: Tree) -> Tensor:
        """``L_val(w, λ)`` without any graph."""
        with torch.no_grad():
            return checked_scalar(self.loss(w, lam, self.batch), "outer_loss").detach()


class Terms(NamedTuple):
    """What a hypergradient consists of, before anything is checked; a leaf that is ``None`` says "λ plays no part here".

    Attributes:
        outer_loss: ``L_val`` (detached scalar).
        direct: ``∂L_val/∂λ``.
        indirect: ``α · dw_T/dλ``, or an estimate of it.
        init: ``dL_val/dw_0``, where the method has it.
        info: as in :class:`Response`.
    """

    outer_loss: Tensor
    direct: Tree
    indirect: Tree
    init: Tree | None = None
    info: Any = None


class FinishedRun(NamedTuple):
    """One complete inner run with λ fixed, for calibration.

    Attributes:
        first: ``s_0``.
        last: ``s_T``.
        batches: ``D_1 … D_T``.
        alpha: cotangent of the last weights, ``∂L_val/∂w_T``.
    """

    first: InnerState
    last: InnerState
    batches: Sequence[Any]
    alpha: Tree


class Traits(NamedTuple):
    """What a method's theory says of it; ``docs/estimators.md`` is made from these and from what is measured.

    Attributes:
        sees: the part of the run whose dependence on λ it takes in.
        high_dimensional: whether neither its cost nor its noise grows with the number of hyperparameters.
        bias: where its expectation differs from the exact hypergradient.
    """

    sees: str
    high_dimensional: bool
    bias: str


class Estimator(ABC):
    """A response pullback that is built along the inner run. Subclasses are frozen dataclasses: settings only.

    Properties:
        exact: whether the pullback is the true one (for as many steps as it claims).
        online: whether λ may move between inner steps.
        needs_fixed_lam: whether moving λ during the run is an error.
        traits: see :class:`Traits`; the page "which estimator?" shows them.
    """

    traits: ClassVar[Traits] = Traits("not stated", False, "not stated")

    @property
    def exact(self) -> bool:
        """See the class."""
        return False

    @property
    def online(self) -> bool:
        """See the class."""
        return True

    @property
    def needs_fixed_lam(self) -> bool:
        """See the class."""
        return not self.online

    @property
    def own_size(self) -> bool:
        """Whether the indirect term comes in another size than the hypergradient's, so that it wants a scale-free outer optimiser."""
        return False

    @property
    def drops_indirect(self) -> bool:
        """Whether the pullback is zero by definition, so that only the direct term is left."""
        return False

    @property
    def linear(self) -> bool:
        """Whether the pullback is linear in α, as a chain rule around it needs."""
        return True

    @abstractmethod
    def init(self, step: Step, state: InnerState, lam: Tree) -> Any:
        """What is remembered before the first step."""

    @abstractmethod
    def advance(self, step: Step, state: InnerState, lam: Tree, batch: Any, carry: Any) -> tuple[InnerState, Any]:
        """One inner step, remembered. A carry is used once: the new one replaces it."""

    @abstractmethod
    def respond(self, step: Step, state: InnerState, lam: Tree, carry: Any) -> tuple[Tree, Pullback]:
        """``(point, pullback)``: the weights at which the outer loss is to be taken, and the linear map ``alpha -> Response``."""

    @property
    def needs_outer_loss(self) -> bool:
        """Whether the outer loss shapes what is carried along the run (:meth:`observe`), so that there is no pullback on its own."""
        return False

    def observe(self, step: Step, outer: OuterObjective, state: InnerState, lam: Tree, carry: Any) -> Any:
        """A look at the outer loss after each inner step, before any hyper-step there; returns the new carry. Default: none is taken."""
        return carry

    def differentiate(self, step: Step, outer: OuterObjective, state: InnerState, lam: Tree, carry: Any) -> Terms:
        """The two terms of the hypergradient. Default: :meth:`respond`'s pullback of the outer loss's own cotangent.

        A method that works from values of the outer loss, or has its own approximation of both terms, says so here.
        """
        point, pullback = self.respond(step, state, lam, carry)
        loss, alpha, direct = outer_gradient(outer.loss, point, lam, outer.batch)
        response = pullback(alpha)
        return Terms(loss, direct, response.lam, response.init, response.info)

    def reuse(self, carry: Any, info: Any) -> Any:
        """The carry after an online hyper-step that reported ``info``: what was found out can serve the next one. Default: unchanged."""
        return carry

    def calibrate(self, step: Step, lam: Tree, run: FinishedRun) -> Self:
        """The estimator with settings fitted to a finished run (HyperDistill's algorithm 4); default: itself."""
        return self


class Hypergradient(NamedTuple):
    """A hypergradient and where it comes from.

    Attributes:
        total: ``direct + indirect``, a pytree like λ.
        direct: ``∂L_val/∂λ`` at fixed weights.
        indirect: the estimator's ``α · dw_T/dλ``.
        init: ``dL_val/dw_0`` where the estimator has it, else ``None``.
        outer_loss: ``L_val`` (detached scalar).
        state: the inner state reached.
        cost: what it took (of the whole run for :func:`hypergradient`; since the last hyper-step in an online loop).
        info: what the method reports about itself: of :class:`~metaopt.estimators.IFT` the linear solver's solution, with its residual.
    """

    total: Tree
    direct: Tree
    indirect: Tree
    init: Tree | None
    outer_loss: Tensor
    state: InnerState
    cost: Cost
    info: Any = None


def hypergradient(
    step: Step, outer_loss: OuterLoss, w0: Tree, lam: Tree, batches: Batches, outer_batch: Any, estimator: Estimator, *, horizon: int | None = None
) -> Hypergradient:
    """Run the inner loop from ``w0`` and differentiate the outer loss at its end with respect to ``lam``.

    Args:
        step: Φ, from :func:`metaopt.inner_step` or :func:`metaopt.custom_step`.
        outer_loss: ``(w, lam, batch) -> scalar``.
        w0: initial weights.
        lam: hyperparameters, any pytree of floating-point tensors.
        batches: one batch per inner step: a sequence, or ``t -> batch`` (t = 1 … T) with ``horizon=T``.
        outer_batch: what the outer loss is evaluated on.
        estimator: e.g. ``mo.RMD()`` for the exact gradient.
        horizon: T; default: all of a sequence.

    Raises:
        ValueError: bad shapes, empty batches, integer λ, a loss that is no scalar, λ that influences nothing at all.
        FloatingPointError: if the outer loss or the hypergradient is not finite.

    >>> import torch, metaopt as mo
    >>> step = mo.inner_step(lambda w, lam, _: 0.5 * ((w - lam) ** 2).sum(), mo.inner.SGD(lr=0.5))
    >>> hg = hypergradient(step, lambda w, lam, _: w.sum(), torch.zeros(1), torch.ones(1), [None] * 2, None, mo.RMD())
    >>> hg.total  # 1 - (1 - 0.5)^2
    tensor([0.7500])
    """
    check_lam(lam)
    lam = tree.detach(lam)
    cost = Cost()
    counted = CountedStep(step, cost)
    state = counted.init(w0, lam)
    carry = estimator.init(counted, state, lam)
    outer = OuterObjective(outer_loss, outer_batch)
    for batch in each(batches, horizon):
        state, carry = estimator.advance(counted, state, lam, batch, carry)
        carry = estimator.observe(counted, outer, state, lam, carry)
    return evaluate(counted, outer_loss, state, lam, outer_batch, estimator, carry)


def evaluate(
    step: CountedStep, outer_loss: OuterLoss, state: InnerState, lam: Tree, outer_batch: Any, estimator: Estimator, carry: Any
) -> Hypergradient:
    """The hypergradient at the state an inner run has reached (the common end of offline and online use)."""
    terms = estimator.differentiate(step, OuterObjective(outer_loss, outer_batch), state, lam, carry)
    _check_used(terms.direct, terms.indirect, lam, estimator)
    direct, indirect = tree.filled(terms.direct, lam), tree.filled(terms.indirect, lam)
    total = tree.add(direct, indirect)
    check_finite(total, indirect, state, estimator)
    return Hypergradient(total, direct, indirect, terms.init, terms.outer_loss, state, step.cost, terms.info)


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
        where = f"the weight {bad} is not finite: the inner run diverged (lower its learning rate)" if bad else "the weights are finite"
        raise FloatingPointError(f"outer_loss is {loss.item()}; {where}")
    w_flat, w_spec = tree.flatten(w)
    alpha = tree.unflatten([torch.zeros_like(x) if g is None else g for g, x in zip(gradients, w_flat, strict=False)], w_spec)
    return loss.detach(), alpha, tree.unflatten(gradients[len(w_flat) :], tree.flatten(lam)[1])


def _value_and_gradient(outer_loss: OuterLoss, w: Tree, lam: Tree, batch: Any) -> ValueAndGradient:
    with torch.enable_grad():
        w_, lam_ = tree.attach(w), tree.attach(lam)
        loss = checked_scalar(outer_loss(w_, lam_, batch), "outer_loss")
        if not loss.requires_grad:
            raise ValueError("outer_loss depends neither on the weights nor on lam, or its graph was cut (detach, no_grad, .item(), argmax)")
        gradients = torch.autograd.grad(loss, tree.leaves((w_, lam_)), allow_unused=True)
        torch.clear_autocast_cache()  # as in the inner step
    return loss, gradients


def each(batches: Batches, horizon: int | None = None) -> Iterator[Any]:
    """The batches of steps 1 … T.

    Raises:
        ValueError: if there are none, too few, or no way to know how many.
    """
    if horizon is not None and horizon < 1:
        raise ValueError(f"horizon must be at least 1, got {horizon}: without an inner step nothing depends on lam indirectly")
    if callable(batches):
        if horizon is None:
            raise ValueError("batches is a function of t, so horizon=T must say how many inner steps to take")
        return (batches(t) for t in range(1, horizon + 1))
    if not isinstance(batches, Sequence):
        raise TypeError(f"batches must be a sequence or a function t -> batch, got {type(batches).__name__}; make a list of an iterator first")
    if len(batches) == 0:
        raise ValueError("batches is empty: one batch per inner step is needed")
    if horizon is not None and len(batches) < horizon:
        raise ValueError(f"horizon is {horizon}, but there are only {len(batches)} batches")
    return iter(batches[:horizon])


def check_lam(lam: Tree) -> None:
    """Raise a ``ValueError`` that names the first leaf of λ which cannot have a gradient."""
    flat = tree.leaves(lam)
    if not flat:
        raise ValueError("lam has no leaves: there is nothing to differentiate with respect to")
    for name, leaf in zip(tree.names(lam), flat, strict=True):
        if not tree.is_float(leaf):
            kind = f"a tensor of {leaf.dtype}" if isinstance(leaf, Tensor) else f"a {type(leaf).__name__} ({leaf!r})"
            raise ValueError(f"lam at {name} is {kind}; hyperparameters are floating-point tensors, e.g. torch.tensor(0.1)")


def _check_used(direct: Tree, indirect: Tree, lam: Tree, estimator: Estimator) -> None:
    if estimator.drops_indirect and all(leaf is None for leaf in tree.leaves(direct)):
        warnings.warn(
            f"outer_loss does not see lam, and {type(estimator).__name__} drops the indirect term: the hypergradient is zero by construction. "
            "Use an estimator with an indirect term (OneStep, RMD, HyperDistill, …)",
            ZeroHypergradientWarning,
            stacklevel=4,
        )
    unused = [name for name, d, i in zip(tree.names(lam), tree.leaves(direct), tree.leaves(indirect), strict=True) if d is None and i is None]
    if not unused:
        return
    if len(unused) == len(tree.leaves(lam)):
        raise ValueError(
            f"no leaf of lam influences the inner step or the outer loss ({', '.join(unused)}): use lam inside the losses or the optimiser's "
            "hyperparameters, and check that nothing detaches it"
        )
    warnings.warn(
        f"lam at {', '.join(unused)} influences neither the inner step nor the outer loss; its hypergradient is zero. Remove it, or use it.",
        UnusedHyperparameterWarning,
        stacklevel=4,
    )


def check_finite(total: Tree, indirect: Tree, state: InnerState, estimator: Estimator) -> None:
    """Raise a ``FloatingPointError`` that names the first leaf of λ whose hypergradient is no finite number."""
    if tree.is_finite(total):
        return
    part = "indirect" if tree.first_non_finite(indirect) else "direct"
    where = f"lam{tree.first_non_finite(total)} (its {part} term, after {state.t} inner steps, {type(estimator).__name__})"
    raise FloatingPointError(
        f"the hypergradient is not finite at {where}: the sweep overflowed (shorter horizon, TruncatedRMD, smaller inner learning "
        "rate), or an operation has an infinite derivative (sqrt or norm at 0)"
    )
