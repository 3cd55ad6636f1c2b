"""A stacked meta-batch a few tasks at a time, for when memory is short."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from metaopt import tree
from metaopt.inner import InnerState, Linearized, Step
from metaopt.inner.contract import WrappedStep, Wrt
from metaopt.inner.tasks import Loss, TaskLoss, is_stacked
from metaopt.tree import Tree


class InTaskChunks(NamedTuple):
    """A stacked problem, a few tasks at a time.

    Attributes:
        step: Φ of the meta-batch.
        outer_loss: the outer loss of the meta-batch.
    """

    step: Step
    outer_loss: TaskLoss


def in_task_chunks(step: Step, outer_loss: Loss, tasks_at_once: int) -> InTaskChunks:
    """The same Φ and outer loss of a stacked meta-batch, at most ``tasks_at_once`` tasks at a time.

    Every estimator takes them in place of the originals, online and offline, and gets the same
    numbers to rounding; random draws come in another order. Cost: one more evaluation of the outer
    loss. Memory: the graphs of ``tasks_at_once`` tasks; what keeps graphs on purpose
    (:class:`~metaopt.trajectory.Graphs`, the 1-step method's training step, forward mode), or is
    built from the inner loss alone (EvoGrad, DARTS and its kin), holds all tasks at once.

    Args:
        step: made of a loss from :func:`metaopt.vmapped` or :func:`metaopt.looped`.
        outer_loss: a loss over tasks from one of the two.
        tasks_at_once: tasks at a time; the last chunk may be smaller.

    Raises:
        ValueError: if ``tasks_at_once`` is less than 1.
        TypeError: if the step or the outer loss is not one of stacked tasks.
    """
    if tasks_at_once < 1:
        raise ValueError(f"tasks_at_once is a number of tasks, at least 1, got {tasks_at_once}")
    if not is_stacked(step):
        raise TypeError("the step is not one of stacked tasks: make its inner loss with mo.vmapped or mo.looped")
    if not isinstance(outer_loss, TaskLoss):
        raise TypeError(
            f"outer_loss must come from mo.vmapped or mo.looped, so that it can be split into tasks; got {outer_loss!r}"
        )
    return InTaskChunks(TaskChunks(step, tasks_at_once), LossInChunks(outer_loss, outer_loss.reduction, tasks_at_once))


@dataclass(frozen=True)
class LossInChunks(TaskLoss):
    """The loss of a meta-batch, the graphs of a few tasks at a time; see :func:`in_task_chunks`."""

    tasks_at_once: int = 1

    def __post_init__(self) -> None:
        """The settings were checked by :func:`in_task_chunks`."""

    @override
    def one(self, w: Tree, lam: Tree, batch: Any) -> Tensor:
        assert isinstance(self.loss, TaskLoss)
        return self.loss.one(w, lam, batch)

    @override
    def over_tasks(self, fn: Callable[[Tree, Tree, Any], Any], w: Tree, lam: Tree, batch: Any) -> Any:
        assert isinstance(self.loss, TaskLoss)
        over = self.loss.over_tasks
        parts = _parts((w, batch), self.tasks_at_once)
        found = [checkpoint(over, fn, w_i, lam, batch_i, use_reentrant=False) for w_i, batch_i in parts]
        return tree.map(lambda *rows: torch.cat(rows), *found)


@dataclass(frozen=True)
class TaskChunks(WrappedStep):
    r"""Φ of a stacked meta-batch, a few tasks at a time; see :func:`in_task_chunks`.

    Tasks do not see each other, so that with the tasks split into parts :math:`P`

    .. math::
        \alpha A = [\alpha_P A_P]_P, \qquad \alpha B = \sum_P \alpha_P B_P, \qquad
        \nabla L_{val} = \sum_P \nabla L_{val, P}:

    the graph of one part at a time is enough. The states of all tasks are still kept.
    """

    step: Step
    tasks_at_once: int

    @override
    def around(self, step: Step) -> TaskChunks:
        return TaskChunks(step, self.tasks_at_once)

    @override
    def __call__(self, state: InnerState, lam: Tree, batch: Any) -> InnerState:
        return _joined([self.step(state_i, lam, batch_i) for state_i, batch_i in self._parts(state, batch)])

    @override
    def evaluate(self, state: InnerState, lam: Tree, batch: Any) -> tuple[InnerState, Tensor | None]:
        return self(state, lam, batch), None

    @override
    def linearize(self, state: InnerState, lam: Tree, batch: Any) -> Linearized:
        """The graphs of all parts."""
        parts = [self.step.linearize(state_i, lam, batch_i) for state_i, batch_i in self._parts(state, batch)]
        return LinearizedParts(parts, self.tasks_at_once)

    @override
    def vjp(
        self, state: InnerState, lam: Tree, batch: Any, cotangent: InnerState, *, wrt: Wrt = "both"
    ) -> tuple[InnerState | None, Tree]:
        """The adjoint with one part's graph at a time."""
        parts = self._parts(state, batch, cotangent)
        return _gathered(self.step.vjp(state_i, lam, batch_i, bar_i, wrt=wrt) for state_i, batch_i, bar_i in parts)

    @override
    def adapt(self, state: InnerState, lam: Tree, batch: Any, alpha: Tree) -> tuple[Tree, Tree]:
        found = [
            self.step.adapt(state_i, lam, batch_i, alpha_i)
            for state_i, batch_i, alpha_i in self._parts(state, batch, alpha)
        ]
        return _joined([u for u, _ in found]), _sum([bar for _, bar in found])

    def _parts(self, *stacked: Tree) -> Iterator[tuple[Tree, ...]]:
        return _parts(stacked, self.tasks_at_once)


class LinearizedParts(Linearized):
    """The parts of Φ at one point."""

    __slots__ = ("_parts", "_tasks_at_once")

    def __init__(self, parts: list[Linearized], tasks_at_once: int) -> None:
        self._parts = parts
        self._tasks_at_once = tasks_at_once

    @property
    @override
    def state(self) -> InnerState:
        return _joined([part.state for part in self._parts])

    @override
    def pullback(
        self, cotangent: InnerState, wrt: Wrt = "both", *, last: bool = False
    ) -> tuple[InnerState | None, Tree]:
        bars = _parts((cotangent,), self._tasks_at_once)
        return _gathered(part.pullback(bar, wrt, last=last) for part, (bar,) in zip(self._parts, bars, strict=True))

    @override
    def pushforward(
        self, state_dots: InnerState, lam_dots: Tree, *, columns_at_once: int | None = None, bound: float | None = None
    ) -> InnerState:
        """Part by part; tasks are on the second axis of the tangents."""
        moved = []
        for part, (dots,) in zip(self._parts, _parts((_swapped(state_dots),), self._tasks_at_once), strict=True):
            columns = _swapped(dots)
            moved.append(part.pushforward(columns, lam_dots, columns_at_once=columns_at_once, bound=bound))
        return _swapped(_joined([_swapped(dots) for dots in moved]))

    @property
    @override
    def columns_at_once(self) -> int:
        return self._parts[0].columns_at_once

    @property
    @override
    def products(self) -> int:
        return max(part.products for part in self._parts)


def _swapped(dots: Tree) -> Tree:
    return tree.map(lambda x: x.transpose(0, 1) if tree.is_float(x) else x, dots)


def _parts(stacked: tuple[Tree, ...], tasks_at_once: int) -> Iterator[tuple[Tree, ...]]:
    """The trees cut along the first axis of their tensors; leaves that are not tensors are shared."""
    tasks = next(leaf.shape[0] for leaf in tree.leaves(stacked) if isinstance(leaf, Tensor))
    for start in range(0, tasks, tasks_at_once):
        rows = slice(start, start + tasks_at_once)
        yield tree.map(lambda leaf, rows=rows: _cut(leaf, rows, tasks), stacked)


def _cut(leaf: Any, rows: slice, tasks: int) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.shape[:1] != (tasks,):
        raise ValueError(
            f"a meta-batch of {tasks} tasks has them on the first axis of every tensor, but one has shape "
            f"{tuple(leaf.shape)}"
        )
    return leaf[rows]


def _joined(parts: list[Tree]) -> Tree:
    return tree.map(lambda *leaves: torch.cat(leaves) if isinstance(leaves[0], Tensor) else leaves[0], *parts)


def _gathered(products: Iterator[tuple[InnerState | None, Tree]]) -> tuple[InnerState | None, Tree]:
    """``(αA, αB)`` of all parts from those of each."""
    bars: list[InnerState] = []
    total: Tree = None
    for state_bar, product in products:
        total = tree.add(total, product)
        if state_bar is not None:
            bars.append(state_bar)
    return _joined(bars) if bars else None, total


def _sum(products: list[Tree]) -> Tree:
    total: Tree = None
    for product in products:
        total = tree.add(total, product)
    return total
