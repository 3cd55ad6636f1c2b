r"""The inner step of a model whose buffers move with its forward passes.

.. math:: (L, b') = \ell(w, b, \lambda; D), \qquad (w', v') = \mathrm{optimiser}(\nabla_w L,\; w, v, \lambda)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

from metaopt import replay, tree
from metaopt.functional import WithBuffers
from metaopt.inner._first_look import FirstLook
from metaopt.inner.contract import Linearized, Stationary, check_weights, checked_scalar
from metaopt.inner.custom import LinearizedCustomStep
from metaopt.inner.state import InnerState
from metaopt.inner.step import InnerStep, StepOfLoss, check_optimizer
from metaopt.inner.tasks import Stacked, TaskLoss
from metaopt.optim.optimizer import Optimizer
from metaopt.tree import Tree

LossWithBuffers: TypeAlias = Callable[[WithBuffers, Tree, Any], tuple[Tensor, Tree]]
"""``inner_loss(w, lam, batch) -> (scalar, buffers)``."""


def inner_step_with_buffers(inner_loss: LossWithBuffers | TaskLoss, optimizer: Optimizer) -> StepWithBuffers:
    r"""The inner step of a model whose buffers move: running statistics, vectors of spectral norm.

    .. math::
        (L, b') = \ell(w, b, \lambda; D), \qquad
        (w', v') = \mathrm{optimiser}(\nabla_w L,\; w, v, \lambda)

    The weights of this step are a :class:`metaopt.WithBuffers`: the optimiser moves ``w.params``,
    the forward pass ``w.buffers``. Both are part of the state, so the outer loss sees the buffers
    that the run has reached, and the hypergradient goes through them.

    Cost and memory: those of :func:`metaopt.inner_step` by reverse over reverse, and the optimiser's
    own graph. Bias: exact. Estimators that rebuild the step from its loss (EvoGrad, DARTS, SAMA,
    SOBA, BOME, F2SA), reversible trajectories and compiled steps refuse it by name.

    Torch holds the vectors of spectral norm constant in the inner gradient, here their derivative is
    part of it (:func:`metaopt.functional`): the two runs agree as far as those have converged.

    Args:
        inner_loss: ``(w, lam, batch) -> (scalar, buffers)``; of stacked tasks ``mo.vmapped`` or
            ``mo.looped`` of such a function.
        optimizer: an inner optimiser from :mod:`metaopt.optim`.

    Raises:
        TypeError: if one of the two is not what it should be.

    >>> import metaopt as mo
    >>> model = mo.functional(torch.nn.BatchNorm1d(1))
    >>> def loss(w, lam, x):
    ...     out, buffers = model.with_buffers(w.params, w.buffers, x)
    ...     return (out - lam).square().mean(), buffers
    >>> step = inner_step_with_buffers(loss, mo.optim.SGD(lr=0.1))
    >>> state = step(step.init(model.moving, torch.ones(())), torch.ones(()), torch.tensor([[1.0], [3.0]]))
    >>> state.w.buffers["running_mean"]  # 0.9 · 0 + 0.1 · 2
    tensor([0.2000])
    """
    if not callable(inner_loss):
        raise TypeError(
            f"inner_loss must be a function (w, lam, batch) -> (scalar, buffers), got {type(inner_loss).__name__}"
        )
    return StepWithBuffers(inner_loss, check_optimizer(optimizer, inner_loss))


@dataclass(frozen=True)
class StepWithBuffers(StepOfLoss):
    """Φ of weights and buffers; see :func:`inner_step_with_buffers`.

    Attributes:
        inner_loss: ``(w, lam, batch) -> (scalar, buffers)``.
        optimizer: the update rule of the weights.
    """

    inner_loss: LossWithBuffers | TaskLoss
    optimizer: Optimizer
    _look: FirstLook = field(default_factory=FirstLook, repr=False, compare=False)

    @override
    def init(self, w: Tree, lam: Tree) -> InnerState:
        w = w.w if isinstance(w, Stacked) else w
        if not isinstance(w, WithBuffers):
            raise TypeError(
                f"a step with buffers starts from mo.WithBuffers(params, buffers), as model.moving is; got "
                f"{type(w).__name__}"
            )
        check_weights(w.params)
        check_buffers(w.buffers)
        return InnerState(w, self.optimizer.init(w.params), self.optimizer.steps_taken)

    @override
    def __call__(self, state: InnerState, lam: Tree, batch: Any) -> InnerState:
        if torch.is_grad_enabled() and (tree.requires_grad(state) or tree.requires_grad(lam)):
            return self._differentiable(state, lam, batch)[0]
        return self.evaluate(state, lam, batch)[0]

    @override
    def evaluate(self, state: InnerState, lam: Tree, batch: Any) -> tuple[InnerState, Tensor | None]:
        one = _Pass(self.inner_loss, state.w.buffers)
        weights, loss = one.step(self).evaluate(state._replace(w=state.w.params), lam, batch)
        return weights._replace(w=WithBuffers(weights.w, tree.detach(one.moved))), loss

    @override
    def linearize(self, state: InnerState, lam: Tree, batch: Any) -> Linearized:
        with torch.enable_grad():
            state_ = tree.attach(state)
            lam_ = tree.attach(lam)
            new, loss = self._differentiable(state_, lam_, batch)
        return LinearizedCustomStep(state_, lam_, new, loss)

    @override
    def stationary(self, state: InnerState, rate: float | None) -> Stationary:
        """Φ itself: at its fixed point the buffers stand still, too."""
        if rate not in (None, 1.0):
            raise ValueError(
                f"a step with buffers is its own fixed-point map and takes no rate, got {rate}: leave it out (IFT), or "
                "use RMD or TruncatedRMD"
            )
        return Stationary(self, state, 1.0, symmetric=False)

    def _differentiable(self, state: InnerState, lam: Tree, batch: Any) -> tuple[InnerState, Tensor]:
        """Φ with a graph through everything that requires grad, and the loss on the way.

        Before the first one the loss is looked at without the buffers' graph, whose leaves would be
        taken for undeclared tensors. Cost, once: one gradient.
        """
        if not self._look.reached:
            with replay.preserved(state), torch.no_grad():
                self.evaluate(tree.detach(state), tree.detach(lam), batch)
        one = _Pass(self.inner_loss, state.w.buffers)
        params = tree.map(lambda x: x if x.requires_grad else x.detach().requires_grad_(), state.w.params)
        weights = one.step(self)(state._replace(w=params), lam, batch)
        assert one.loss is not None
        return weights._replace(w=WithBuffers(weights.w, one.moved)), one.loss.detach()


class _Pass:
    """One evaluation of the inner loss: as a loss of the weights alone, which sets the moved buffers aside."""

    def __init__(self, inner_loss: LossWithBuffers | TaskLoss, buffers: Tree) -> None:
        self._of = inner_loss
        self._buffers = buffers
        self.loss: Tensor | None = None
        self.moved: Tree = None

    def step(self, around: StepWithBuffers) -> InnerStep:
        """The step of the weights at these buffers."""
        return InnerStep(self, around.optimizer, _look=around._look)

    def __call__(self, params: Tree, lam: Tree, batch: Any) -> Tensor:
        w = WithBuffers(params, self._buffers)
        if isinstance(self._of, TaskLoss):
            losses, moved = self._of.over_tasks(self._one_task, w, lam, batch)
            loss = losses.sum()
        else:
            loss, moved = self._checked(self._of(w, lam, batch))
        self.loss = loss
        self.moved = moved
        return loss

    def _one_task(self, w: WithBuffers, lam: Tree, batch: Any) -> tuple[Tensor, Tree]:
        assert isinstance(self._of, TaskLoss)
        return self._checked(self._of.loss(w, lam, batch))

    def _checked(self, found: Any) -> tuple[Tensor, Tree]:
        """The loss and those of the buffers that are carried."""
        if not isinstance(found, tuple) or len(found) != 2:
            raise TypeError(
                "the inner loss of a step with buffers returns (loss, buffers), e.g. those that model.with_buffers "
                f"returned; got {type(found).__name__}"
            )
        loss, moved = found
        if isinstance(self._buffers, dict) and isinstance(moved, dict):
            missing = sorted(self._buffers.keys() - moved.keys())
            if missing:
                raise ValueError(f"the inner loss does not return the buffers {missing}")
            moved = {name: moved[name] for name in self._buffers}
        return checked_scalar(loss, "inner_loss"), moved


def check_buffers(buffers: Tree) -> None:
    """Raise a ``ValueError`` that names the first buffer which is not a floating-point tensor."""
    for i, leaf in enumerate(tree.leaves(buffers)):
        if not tree.is_float(leaf):
            kind = f"a tensor of {leaf.dtype}" if isinstance(leaf, Tensor) else type(leaf).__name__
            raise ValueError(
                f"the buffer {tree.names(buffers)[i]} is {kind}; a state carries floating-point buffers (model.moving "
                "holds those of a model)"
            )
