"""An inner run as one differentiable function.

``w_T = unroll(step, w0, lam, batches).w``, then any loss and ``.backward()``.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from metaopt import replay, tree
from metaopt.estimators.base import Estimator, Pullback
from metaopt.estimators.hypergradient import Batches, check_finite, check_lam, each
from metaopt.estimators.reverse import RMD
from metaopt.inner.closed import closed_over as with_closed_over
from metaopt.inner.closed import undeclared
from metaopt.inner.contract import Step
from metaopt.inner.state import InnerState
from metaopt.tree import Tree


class UndeclaredTensorWarning(UserWarning):
    """The inner loss depends on a tensor that requires grad and that :func:`unroll` was not told about."""


def unroll(
    step: Step,
    w0: Tree,
    lam: Tree,
    batches: Batches,
    *,
    estimator: Estimator = RMD(),
    horizon: int | None = None,
    closed_over: Sequence[Tensor] = (),
) -> InnerState:
    """Run the inner loop; autograd sees it as one node, whose backward pass is the estimator's pullback.

    Gradients reach the leaves of ``lam``, ``w0`` and ``closed_over`` that require grad, whether
    they are leaves of autograd or computed from something; the optimiser slots of the result are
    constants. With :class:`RMD` the gradients are exact; with another estimator they are that
    estimator's, also for ``closed_over``, and ``w0`` gets one only where the estimator has it.
    Several losses on the result and ``retain_graph=True`` work as on any node; its own second
    derivative (``create_graph=True``) does not exist and is an error.

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
        w0: initial weights.
        lam: hyperparameters, any pytree of floating-point tensors; those with
            ``requires_grad=False`` are constants.
        batches: one per inner step, or ``t -> batch`` with ``horizon=T``.
        estimator: any estimator that gives a pullback.
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
    check_lam(lam)
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
    inputs = (w0, lam, list(closed_over))
    run = _Run(step, estimator, batches, horizon, tuple(closed_over))
    if not (torch.is_grad_enabled() and tree.requires_grad(inputs)):
        return run.plain(tree.detach(w0), tree.detach(lam))
    run.warn_of_undeclared(w0, lam)
    flat, spec = tree.flatten(inputs)
    outputs = _Unrolled.apply(run, spec, *flat)
    assert run.last is not None
    return run.last._replace(w=tree.unflatten(outputs, tree.flatten(w0)[1]))


@dataclass
class _Run:
    """One call of :func:`unroll`."""

    step: Step
    estimator: Estimator
    batches: Batches
    horizon: int | None
    closed: tuple[Tensor, ...]
    last: InnerState | None = None

    def plain(self, w0: Tree, lam: Tree) -> InnerState:
        """Without remembering anything."""
        state = self.step.init(w0, lam)
        with torch.no_grad():
            for batch in each(self.batches, self.horizon):
                state = self.step(state, lam, batch)
        return state

    def remembered(self, w0: Tree, lam: Tree, closed: list[Tensor]) -> Pullback:
        """With the estimator; λ is ``(lam, closed)`` where there is something closed over."""
        step = with_closed_over(self.step, self.closed) if self.closed else self.step
        full = (lam, closed) if self.closed else lam
        state = step.init(w0, full)
        carry = self.estimator.init(step, state, full)
        for batch in each(self.batches, self.horizon):
            state, carry = self.estimator.advance(step, state, full, batch, carry)
        point, pullback = self.estimator.respond(step, state, full, carry)
        self.last = tree.detach(state._replace(w=point))
        return pullback

    def warn_of_undeclared(self, w0: Tree, lam: Tree) -> None:
        """One evaluation of the inner loss, to see what else it depends on."""
        step = with_closed_over(self.step, self.closed) if self.closed else self.step
        full = tree.detach((lam, list(self.closed)) if self.closed else lam)
        with replay.preserved(w0):  # the batch itself may be drawn
            first = next(iter(each(self.batches, self.horizon)))
            found = undeclared(step, step.init(w0, full), full, first)
        if found:
            shapes = ", ".join(str(tuple(leaf.shape)) for leaf in found[:4])
            warnings.warn(
                f"the inner loss depends on {len(found)} tensor(s) that require grad and are neither weights nor lam "
                f"(shapes {shapes}): they get no "
                "gradient. Put them into lam, declare them with closed_over=[...], or detach them",
                UndeclaredTensorWarning,
                stacklevel=3,
            )


class _Unrolled(torch.autograd.Function):
    """The node."""

    @staticmethod
    def forward(ctx: Any, run: _Run, spec: tree.Spec, *flat: Any) -> tuple[Tensor, ...]:
        w0, lam, closed = tree.unflatten([x.detach() for x in flat], spec)
        ctx.pullback = run.remembered(w0, lam, closed)
        assert run.last is not None
        ctx.state, ctx.estimator, ctx.closed = run.last, run.estimator, bool(run.closed)
        ctx.like, ctx.counts = run.last.w, (len(tree.leaves(w0)), len(tree.leaves(lam)), len(closed))
        ctx.autocast = [
            (kind, torch.get_autocast_dtype(kind)) for kind in _device_types(flat) if torch.is_autocast_enabled(kind)
        ]
        ctx.save_for_backward(*flat)
        ctx.set_materialize_grads(False)
        return tuple(x.clone() for x in tree.leaves(run.last.w))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *bars: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        _ = ctx.saved_tensors  # raises if somebody changed them in place, or if the graph has been used up
        n_w, n_lam, n_closed = ctx.counts
        flat = tree.leaves(ctx.like)
        if all(bar is None for bar in bars):
            return (None,) * (2 + n_w + n_lam + n_closed)
        alpha = tree.unflatten(
            [torch.zeros_like(x) if b is None else b for b, x in zip(bars, flat, strict=True)],
            tree.flatten(ctx.like)[1],
        )
        with ExitStack() as contexts:
            for kind in ("cpu", "cuda"):
                contexts.enter_context(torch.autocast(kind, enabled=False)) if torch.is_autocast_enabled(kind) else None
            for kind, dtype in ctx.autocast:
                contexts.enter_context(torch.autocast(kind, dtype=dtype))
            response = ctx.pullback(alpha)
        check_finite(response.lam, response.lam, ctx.state, ctx.estimator)
        if any(ctx.needs_input_grad[2 : 2 + n_w]) and response.initial is None:
            raise RuntimeError(
                f"w0 requires grad, but {type(ctx.estimator).__name__} has no cotangent for the initial weights: "
                "pass a detached w0, or use RMD"
            )
        w_bars = tree.leaves(response.initial) if response.initial is not None else [None] * n_w
        return (None, None, *w_bars, *tree.leaves(response.lam))


def _device_types(flat: Sequence[Tensor]) -> list[str]:
    return sorted({x.device.type for x in flat})
