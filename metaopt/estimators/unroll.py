"""An inner run as one differentiable function.

``w_T = unroll(step, w0, lam, batches).w``, then any loss and ``.backward()``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from metaopt import tree
from metaopt.estimators._along import as_taken, check_at, responses_along
from metaopt.estimators._arguments import check_arguments, refuse_transforms
from metaopt.estimators._beginning import check_resumed, filled, speak_of_dropped
from metaopt.estimators.base import Estimator, Response
from metaopt.estimators.hypergradient import Batches, check_finite, check_lam, opened
from metaopt.estimators.reverse import RMD
from metaopt.inner._first_look import warn_of
from metaopt.inner.closed import closed_over as with_closed_over
from metaopt.inner.contract import Step
from metaopt.inner.state import InnerState
from metaopt.inner.tasks import for_all_tasks
from metaopt.tree import Tree

States: TypeAlias = Callable[[Mapping[int, InnerState]], Response]
"""The pullback of the cotangents of several states."""


def unroll(
    step: Step,
    w0: Tree,
    lam: Tree,
    batches: Batches,
    *,
    estimator: Estimator = RMD(),
    at: Sequence[int] | None = None,
    horizon: int | None = None,
    closed_over: Sequence[Tensor] = (),
) -> Any:
    """Run the inner loop; autograd sees it as one node, whose backward pass is the estimator's pullback.

    Gradients reach the leaves of ``lam``, ``w0`` and ``closed_over`` that require grad, whether
    they are leaves of autograd or computed from something, and they come from the weights, the
    slots and the buffers of what is returned: runs can be chained. With :class:`RMD` the gradients
    are exact; with another estimator they are that estimator's, also for ``closed_over``, and
    ``w0`` gets one only where the estimator has it. Several losses on the result and
    ``retain_graph=True`` work as on any node; its own second derivative (``create_graph=True``)
    does not exist and is an error, as are ``torch.func``'s transforms around it. With
    :class:`FirstOrder` the initial weights get the gradient of the last: first-order MAML.

    Under ``torch.no_grad()``, or if nothing requires grad, this is the plain run, and nothing is
    remembered. Under ``torch.autocast`` the sweep runs under the same autocast. The sweep happens
    once per call of ``backward``.

    **Hoisting.** What λ and the data alone make, and every inner step would make again (the
    features under ANIL's head, where the batch repeats), can
    be made once and given to the run as its hyperparameters; autograd does the rest::

        features = body(lam, x)  # lam requires grad
        w = mo.unroll(head_step, w0, features, [y] * T).w
        head_loss(w, body(lam, x_val), y_val).backward()

    Args:
        step: Φ.
        w0: initial weights, or the state of an earlier run to go on from.
        lam: hyperparameters, any pytree of floating-point tensors; those with
            ``requires_grad=False`` are constants. ``None`` where only the initial weights learn.
        batches: one per inner step, or ``t -> batch`` with ``horizon=T``.
        estimator: any estimator that gives a pullback.
        at: steps ``t`` (1 … T, increasing) whose states are returned, in a tuple, each of them
            differentiable. Exact reverse mode takes one sweep for all of them; other estimators
            respond at each.
        horizon: T.
        closed_over: tensors that the inner loss uses without being given them (a teacher's
            parameters, …). One that requires grad and is not declared gets no gradient, and a
            warning says so.

    Raises:
        ValueError: for an estimator without a pullback, or with one that is not linear.
        RuntimeError: in the backward pass, if ``w0`` requires grad but the estimator has no
            cotangent for it.
        FloatingPointError: in the backward pass, if the gradient is not finite.

    >>> import torch, metaopt as mo
    >>> step = mo.inner_step(lambda w, lam, _: 0.5 * ((w - lam) ** 2).sum(), mo.optim.SGD(lr=0.5))
    >>> lam = torch.ones(1, requires_grad=True)
    >>> unroll(step, torch.zeros(1), lam, [None] * 2).w.sum().backward()
    >>> lam.grad
    tensor([0.7500])
    """
    check_arguments(step, w0, lam, batches, estimator)
    check_lam(lam, estimator)
    if estimator.needs_outer_loss:
        raise ValueError(
            f"{type(estimator).__name__} needs to see the outer loss during the run, so there is no pullback to "
            "unroll with"
        )
    if not estimator.linear:
        raise ValueError(
            f"{estimator!r} is not linear in its cotangent, so autograd cannot chain through it: use "
            "mo.hypergradient or mo.online"
        )
    for tensor in closed_over:
        if not tree.is_float(tensor):
            raise ValueError(f"closed_over holds floating-point tensors, got {tensor!r}")
    refuse_transforms((w0, lam, closed_over))
    steps = None if at is None else check_at(at, estimator)
    inputs = (w0, lam, list(closed_over))
    run = _Run(step, estimator, batches, horizon, steps, tuple(closed_over))
    first, stream = run.opened()
    if not (torch.is_grad_enabled() and tree.requires_grad(inputs)):
        states = run.plain(w0, lam, first, stream)
    else:
        states = run.differentiable(w0, lam, first, stream)
    return states[0] if at is None else tuple(states)


@dataclass
class _Run:
    """What one call of :func:`unroll` hands to its autograd node."""

    step: Step
    estimator: Estimator
    batches: Batches
    horizon: int | None
    at: tuple[int, ...] | None
    closed: tuple[Tensor, ...]

    def plain(self, w0: Tree, lam: Tree, batch: Any, batches: Iterator[Any]) -> list[InnerState]:
        """The states that are asked for, without remembering anything on the way."""
        with torch.no_grad():
            lam = tree.detach(lam)
            state = tree.detach(self._begin(self.step, w0, lam, batch))
            first = state.t
            reached = []
            for batch in batches:
                state = self.step(state, lam, batch)
                if self.at is not None and state.t - first in self.at:
                    reached.append(state)
        if self.at is not None and len(reached) < len(self.at):
            raise ValueError(f"at={self.at}, but the run has {state.t - first} steps")
        return [state] if self.at is None else reached

    def differentiable(self, w0: Tree, lam: Tree, batch: Any, batches: Iterator[Any]) -> list[InnerState]:
        """As a node from the first state, λ and what is closed over to the states reached."""
        step = with_closed_over(self.step, self.closed) if self.closed else self.step
        full = (lam, list(self.closed)) if self.closed else lam
        state = self._begin(step, w0, full, batch)
        if not self.estimator.gives_initial and not tree.requires_grad(w0):
            if tree.requires_grad(state):
                speak_of_dropped(self.estimator)
            state = tree.detach(state)
        record = _Record(self, step, state, full, batches)
        outputs = iter(_Unrolled.apply(record, *tree.floats((state, full))))
        warn_of(step.undeclared)
        return tree.map(lambda x: next(outputs) if tree.is_float(x) else x, record.reached)

    def remembered(
        self, step: Step, state: InnerState, lam: Tree, batches: Iterator[Any]
    ) -> tuple[list[InnerState], States]:
        """The states that the run reaches, and the pullback of their cotangents."""
        if self.at is not None:
            return responses_along(step, state, lam, batches, self.estimator, self.at)
        carry = self.estimator.init(step, state, lam)
        for batch in batches:
            state, carry = self.estimator.advance(step, state, lam, batch, carry)
        point, pullback = self.estimator.respond(step, state, lam, carry)
        last = tree.detach(state._replace(w=point))
        return [last], lambda cotangents: pullback(as_taken(self.estimator, cotangents[last.t]))

    def _begin(self, step: Step, w0: Tree, lam: Tree, batch: Any) -> InnerState:
        if not isinstance(w0, InnerState):
            return step.init(for_all_tasks(step, w0, batch), lam)
        check_resumed(step, w0, lam)
        return w0

    def opened(self) -> tuple[Any, Iterator[Any]]:
        """The first batch, and all of them."""
        horizon = self.horizon
        if horizon is None and self.at is not None and callable(self.batches):
            horizon = self.at[-1]
        return opened(self.batches, horizon, self.step.steps_at_once)


class _Record:
    """What the node is made from, and the states that its forward pass reached."""

    def __init__(self, run: _Run, step: Step, state: InnerState, lam: Tree, batches: Iterator[Any]) -> None:
        self.run = run
        self.step = step
        self.state = tree.detach(state)
        self.lam = tree.detach(lam)
        self.batches = batches
        self.reached: list[InnerState] = []


class _Unrolled(torch.autograd.Function):
    """The node: floating-point leaves of the first state and of λ to those of the states reached."""

    @staticmethod
    def forward(ctx: Any, record: _Record, *flat: Tensor) -> tuple[Tensor, ...]:
        record.reached, ctx.pullback = record.run.remembered(record.step, record.state, record.lam, record.batches)
        ctx.like = record.reached
        ctx.first = record.state
        ctx.estimator = record.run.estimator
        ctx.autocast = [
            (kind, torch.get_autocast_dtype(kind)) for kind in _device_types(flat) if torch.is_autocast_enabled(kind)
        ]
        ctx.save_for_backward(*flat)
        ctx.set_materialize_grads(False)
        return tuple(x.clone() for x in tree.floats(record.reached))

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *bars: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "unroll has no second derivative: leave out create_graph=True. For a gradient of a gradient, call "
                "the step in a plain loop (it is differentiable), or take differences of mo.hypergradient"
            )
        refuse_transforms(bars)
        flat = ctx.saved_tensors  # raises if somebody changed them in place, or if the graph has been used up
        if all(bar is None for bar in bars):
            return (None,) * (1 + len(flat))
        with _autocast(ctx.autocast):
            response = ctx.pullback(_cotangents(ctx.like, bars))
        check_finite(response.lam, response.lam, ctx.like[-1], ctx.estimator)
        first = tree.floats(ctx.first)
        if response.initial is not None:
            initial: list[Any] = tree.floats(filled(response.initial, ctx.first))
        elif any(ctx.needs_input_grad[1 : 1 + len(first)]):
            raise RuntimeError(
                f"w0 requires grad, but {type(ctx.estimator).__name__} has no cotangent for the initial state: "
                "pass a detached w0, or use RMD"
            )
        else:
            initial = [None] * len(first)
        return (None, *initial, *_float_parts(response.lam, flat[len(first) :]))


def _cotangents(states: list[InnerState], bars: Sequence[Tensor | None]) -> dict[int, InnerState]:
    """The cotangent of each state that has one, by its number ``t``.

    Slots ``None`` where nothing depends on them.
    """
    supply = iter(bars)
    found = {}
    for state in states:
        bar = tree.map(lambda x: next(supply) if tree.is_float(x) else None, state._replace(t=None))
        given = {name: any(x is not None for x in tree.leaves(part)) for name, part in bar._asdict().items()}
        if not any(given.values()):
            continue
        zeros = tree.map(lambda b, x: torch.zeros_like(x) if b is None and tree.is_float(x) else b, bar, state)
        rest = any(given[name] for name in given if name not in ("w", "t"))
        found[state.t] = zeros._replace(t=state.t) if rest else InnerState(zeros.w, None, state.t)
    return found


def _float_parts(lam_bar: Tree, like: Sequence[Tensor]) -> list[Tensor | None]:
    """A cotangent of λ as leaves, one for each floating-point leaf of λ."""
    flat = [x for x in tree.leaves(lam_bar) if x is None or tree.is_float(x)]
    return flat if len(flat) == len(like) else [x for x in flat if x is not None]


@contextmanager
def _autocast(kinds: list[tuple[str, torch.dtype]]) -> Iterator[None]:
    """Under the autocast of the run, and no other."""
    with ExitStack() as contexts:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                contexts.enter_context(torch.autocast(kind, enabled=False))
        for kind, dtype in kinds:
            contexts.enter_context(torch.autocast(kind, dtype=dtype))
        yield


def _device_types(flat: Sequence[Tensor]) -> list[str]:
    return sorted({x.device.type for x in flat})
