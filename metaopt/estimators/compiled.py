"""Steps and outer losses as compiled functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor

from metaopt import tree
from metaopt.inner.chunk import chunked
from metaopt.inner.compiled import Compiled
from metaopt.inner.contract import Step
from metaopt.inner.step import InnerStep
from metaopt.tree import Tree

OuterLoss: TypeAlias = Callable[[Tree, Tree, Any], Tensor]
"""``outer_loss(w, lam, batch) -> scalar``."""

ValueAndGradient: TypeAlias = tuple[Tensor, Sequence[Tensor | None]]


class CompiledLoss(Compiled):
    r"""An outer loss whose value and gradient are one compiled function; called, it is the loss it was.

    :func:`compiled` makes it.

    .. math::
        (w, \lambda) \mapsto \left(L, \frac{\partial L}{\partial w}, \frac{\partial L}{\partial
        \lambda}\right)

    Attributes:
        unused: which leaves of ``(w, λ)`` it does not depend on; ``None`` before the first
            gradient.
    """

    def __init__(self, loss: OuterLoss, backend: str) -> None:
        super().__init__("the outer loss", backend, dynamic=False)
        self.loss = loss
        self.unused: list[bool] | None = None

    def __call__(self, w: Tree, lam: Tree, batch: Any) -> Tensor:
        """The loss itself, eager and differentiable."""
        return self.loss(w, lam, batch)

    def gradient(self, w: Tree, lam: Tree, batch: Any, eager: Callable[[], ValueAndGradient]) -> ValueAndGradient:
        """``L`` and its gradient by every float leaf of ``(w, λ)``, ``None`` where it plays no part.

        That is found out by ``eager``, once.
        """
        out = None if self.unused is None else self._run("gradient", self._value_and_gradient, w, lam, batch)
        if out is None:
            value, gradients = eager()
            self.unused = [g is None for g in gradients]
            return value, gradients
        return out[0], [
            None if missing and not bool(g.any()) else g for g, missing in zip(out[1:], self.unused or [], strict=True)
        ]

    def _value_and_gradient(self, w: Tree, lam: Tree, batch: Any) -> tuple[Tensor, ...]:
        flat = tree.floats((w, lam))

        def loss(*values: Tensor) -> Tensor:
            supply = iter(values)
            w_, lam_ = tree.map(lambda x: next(supply) if tree.is_float(x) else x, (w, lam))
            return self.loss(w_, lam_, batch)

        gradients, value = torch.func.grad_and_value(loss, argnums=tuple(range(len(flat))))(*flat)
        return (value, *gradients)


@overload
def compiled(what: Step, *, steps_at_once: int | None = None, backend: str = "inductor") -> Step: ...
@overload
def compiled(what: OuterLoss, *, steps_at_once: None = None, backend: str = "inductor") -> CompiledLoss: ...
def compiled(
    what: Step | OuterLoss, *, steps_at_once: int | None = None, backend: str = "inductor"
) -> Step | CompiledLoss:
    """The same inner step, or the same outer loss, as compiled functions.

    Of a step, Φ and its adjoint are compiled; of a loss, its value and gradient. The first calls
    take seconds (``step.compilation.seconds``, ``loss.seconds``). What cannot be compiled runs
    eagerly, and a warning says why. Values agree to rounding; the adjoint is always reverse over
    reverse.

    On a small net the calls take the time and not the arithmetic. Several steps in one function are
    then several times as fast again (``docs/benchmarks.md``). The compiler takes a few seconds per
    step of such a group.

    Args:
        what: a step from :func:`metaopt.inner_step`, or an outer loss ``(w, lam, batch) -> scalar``.
        steps_at_once: how many inner steps one compiled function takes; default one. The batches are
            given as ever. What an estimator or trajectory counts in steps, it then counts in
            groups.
        backend: of :func:`torch.compile`.

    Raises:
        TypeError: if it is neither, or a step that is not an optimiser on a loss.

    >>> import metaopt as mo, torch
    >>> step = compiled(mo.inner_step(lambda w, lam, x: lam * (w - x).square().sum(), mo.optim.SGD(lr=0.1)))
    >>> step.compilation
    Compilation(inductor, nothing compiled yet)
    """
    if isinstance(what, InnerStep):
        step = what.compiled(backend)
        return step if steps_at_once is None else chunked(step, steps_at_once)
    if isinstance(what, Step) or not callable(what):
        kind = type(what).__name__
        raise TypeError(
            f"mo.compiled takes a step from mo.inner_step or an outer loss (w, lam, batch) -> scalar; got {kind}"
        )
    if steps_at_once is not None:
        raise TypeError("steps_at_once is for a step; an outer loss has none")
    return CompiledLoss(what, backend)
