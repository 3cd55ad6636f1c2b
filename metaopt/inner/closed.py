"""Tensors that a step closes over, made part of λ: by declaration, without rewriting the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from metaopt import tree
from metaopt.inner.chunk import Chunk, chunked
from metaopt.inner.contract import Step, WrappedStep
from metaopt.inner.custom import CustomStep
from metaopt.inner.step import InnerStep
from metaopt.optim.optimizer import Hyper, Optimizer
from metaopt.tree import Tree


def closed_over(step: Step, tensors: Sequence[Tensor]) -> Step:
    """The same Φ with hyperparameters ``(lam, tensors)``.

    Wherever the step uses one of ``tensors`` itself, the given value is used instead.

    Raises:
        TypeError: for a step that was not made by :func:`inner_step` or :func:`custom_step`.
    """
    keys = [id(tensor) for tensor in tensors]
    if isinstance(step, Chunk):
        return chunked(closed_over(step.step, tensors))
    if isinstance(step, WrappedStep):
        return step.around(closed_over(step.step, tensors))
    if isinstance(step, InnerStep):
        return InnerStep(_substituted(step.inner_loss, keys), OfFirst(step.optimizer), step.adjoint)
    if isinstance(step, CustomStep):
        initial = step.initial
        return CustomStep(_substituted(step.fn, keys), None if initial is None else lambda w, lam: initial(w, lam[0]))
    raise TypeError(
        f"closed-over tensors are found inside steps from inner_step and custom_step only, got {type(step).__name__}"
    )


def _substituted(fn: Callable[[Any, Tree, Any], Any], keys: list[int]) -> Callable[[Any, Tree, Any], Any]:
    def substituted(first: Any, lam: Tree, batch: Any) -> Any:
        with _Substitution(dict(zip(keys, lam[1], strict=True))):
            return fn(first, lam[0], batch)

    return substituted


class _Substitution(TorchFunctionMode):
    """Every torch function called inside sees the stand-ins in place of the originals."""

    def __init__(self, stand_ins: dict[int, Tensor]) -> None:
        super().__init__()
        self._stand_ins = stand_ins

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (tuple(args), dict(kwargs or {}))
        if any(id(leaf) in self._stand_ins for leaf in tree.leaves(given)):
            given = tree.map(lambda x: self._stand_ins.get(id(x), x), given)
        positional, named = given
        return func(*positional, **named)


@dataclass(frozen=True)
class OfFirst(Optimizer):
    """``of``, reading the first part of λ."""

    hypers: ClassVar[tuple[str, ...]] = ()

    of: Optimizer

    @override
    def init(self, w: Tree) -> Tree:
        return self.of.init(w)

    @override
    def update(self, g: Tree, w: Tree, slots: Tree, lam: Tree, t: int) -> tuple[Tree, Tree]:
        return self.of.update(g, w, slots, lam[0], t)

    @property
    @override
    def counts_steps(self) -> bool:
        return self.of.counts_steps

    @property
    @override
    def loss_decay(self) -> Hyper:
        return self.of.loss_decay

    @property
    @override
    def elementwise(self) -> bool:
        return self.of.elementwise

    @property
    @override
    def steps_taken(self) -> int:
        return self.of.steps_taken

    @property
    @override
    def reads_lam(self) -> bool:
        return self.of.reads_lam
