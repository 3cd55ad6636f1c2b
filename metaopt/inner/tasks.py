"""A meta-batch as one stacked problem: weights and batches with a leading task axis, one loss over all tasks.

Tasks are independent, so the stacked problem's Jacobian is block-diagonal and every estimator works
on it unchanged. The hypergradient with respect to the shared λ is the sum over tasks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, NoReturn, TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

from metaopt import tree
from metaopt.inner.contract import checked_scalar
from metaopt.inner.state import InnerState
from metaopt.tree import Tree

Loss: TypeAlias = Callable[[Tree, Tree, Any], Tensor]
"""``(w, lam, batch) -> scalar``."""

Reduction: TypeAlias = Literal["sum", "mean"]
"""What becomes of the losses of all tasks: their sum or their mean."""


class Stacked(NamedTuple):
    """Initial weights with a row for each task, as opposed to weights of one task that all tasks start from.

    Attributes:
        w: weights, every tensor with the task axis first.
    """

    w: Tree


def replicated(w: Tree, tasks: int) -> Stacked:
    """One copy of ``w`` per task, on a new leading axis; differentiable in ``w``.

    The ways in do this by themselves where weights of one task meet a meta-batch.

    Raises:
        ValueError: if there is not at least one task.

    >>> replicated({"b": torch.zeros(3)}, tasks=2).w["b"].shape
    torch.Size([2, 3])
    """
    if tasks < 1:
        raise ValueError(f"a meta-batch needs at least one task, got {tasks}")
    return Stacked(tree.map(lambda x: x.unsqueeze(0).expand(tasks, *x.shape).clone(), w))


@dataclass(frozen=True)
class Ragged:
    """Batches of tasks of different sizes, one for each task; a batch for :func:`looped`.

    Args:
        batches: one batch per task.
    """

    batches: tuple[Any, ...]

    def __post_init__(self) -> None:
        """Hold the batches as a tuple."""
        object.__setattr__(self, "batches", tuple(self.batches))
        if not self.batches:
            raise ValueError("Ragged: batches is empty; give it one batch per task")


@dataclass(frozen=True)
class TaskLoss(ABC):
    """A loss over all tasks of a meta-batch; from :func:`vmapped` or :func:`looped`.

    ``stacked`` tells the other parts that every weight has a task axis first: the inner step maps
    an optimiser that looks at whole tensors over it, and HyperDistill finds the examples behind it.

    Attributes:
        loss: ``(w, lam, batch) -> scalar`` of one task.
        reduction: "sum" or "mean" over tasks.
    """

    stacked: ClassVar[bool] = True

    loss: Loss
    reduction: Reduction = "sum"

    def __post_init__(self) -> None:
        if not callable(self.loss):
            raise TypeError(f"the loss of one task is a function (w, lam, batch) -> scalar, got {self.loss!r}")
        if isinstance(self.loss, TaskLoss):
            raise TypeError("the loss is one of a meta-batch already: give the loss of one task")
        if self.reduction not in ("sum", "mean"):
            raise ValueError(f"reduction over tasks is 'sum' or 'mean', got {self.reduction!r}")

    def __call__(self, w: Tree, lam: Tree, batch: Any) -> Tensor:
        """The sum or mean over tasks of ``loss(w[i], lam, batch[i])``."""
        losses = self.each(w, lam, batch)
        return losses.sum() if self.reduction == "sum" else losses.mean()

    def each(self, w: Tree, lam: Tree, batch: Any) -> Tensor:
        """The losses of all tasks, ``[tasks]``."""
        return self.over_tasks(self.one, w, lam, batch)

    @abstractmethod
    def over_tasks(self, fn: Callable[[Tree, Tree, Any], Any], w: Tree, lam: Tree, batch: Any) -> Any:
        """``fn(w[i], lam, batch[i])`` of every task, stacked on a new first axis."""

    def one(self, w: Tree, lam: Tree, batch: Any) -> Tensor:
        """The loss of one task."""
        return checked_scalar(self.loss(w, lam, batch), "the loss of one task")


def vmapped(
    loss: Loss, *, reduction: Reduction = "sum", tasks_at_once: int | None = None, randomness: str = "different"
) -> Vmapped:
    """The loss of a meta-batch, all tasks in one call by :func:`torch.vmap`.

    Args:
        loss: ``(w, lam, batch) -> scalar`` of one task.
        reduction: "sum" or "mean" over tasks. An inner loss is a sum, so that a task's learning rate
            does not depend on the number of tasks.
        tasks_at_once: tasks computed at a time; default all. The graphs of all are kept: to hold
            fewer, :func:`metaopt.meta.in_task_chunks`.
        randomness: of dropout across tasks, as in :func:`torch.vmap`.

    >>> total = vmapped(lambda w, lam, batch: lam * (w - batch).square().sum())
    >>> total(torch.zeros(2, 3), torch.tensor(0.5), torch.ones(2, 3))
    tensor(3.)
    """
    return Vmapped(loss, reduction, tasks_at_once, randomness)


def looped(loss: Loss, *, reduction: Reduction = "sum") -> Looped:
    """The loss of a meta-batch, one task after the other.

    The faster of the two for convolutions on a CPU, and for whatever :func:`torch.vmap` cannot do
    (an LSTM). Takes tasks of different sizes (:class:`Ragged`).

    Memory: the graphs of all tasks, as in :func:`vmapped`.

    Args:
        loss: ``(w, lam, batch) -> scalar`` of one task.
        reduction: "sum" or "mean" over tasks; of an inner loss a sum.

    >>> total = looped(lambda w, lam, batch: lam * (w - batch).square().mean())
    >>> total(torch.zeros(2), torch.tensor(0.5), Ragged([torch.ones(3), torch.ones(5)]))
    tensor(1.)
    """
    return Looped(loss, reduction)


@dataclass(frozen=True)
class Vmapped(TaskLoss):
    """All tasks in one call; see :func:`vmapped`."""

    tasks_at_once: int | None = None
    randomness: str = "different"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tasks_at_once is not None and self.tasks_at_once < 1:
            raise ValueError(f"vmapped: tasks_at_once must be at least 1, got {self.tasks_at_once}")
        if self.randomness not in ("different", "same", "error"):
            raise ValueError(f"vmapped: randomness is 'different', 'same' or 'error', got {self.randomness!r}")

    @override
    def over_tasks(self, fn: Callable[[Tree, Tree, Any], Any], w: Tree, lam: Tree, batch: Any) -> Any:
        if isinstance(batch, Ragged):
            raise TypeError("tasks of different sizes cannot be computed in one call: take mo.looped(loss)")
        flat, spec = tree.flatten((w, batch))
        axes = tuple([0 if isinstance(leaf, Tensor) else None for leaf in flat])

        def one(*leaves: Any) -> Any:
            w_i, batch_i = tree.unflatten(leaves, spec)
            return fn(w_i, lam, batch_i)

        mapped = torch.vmap(one, axes, chunk_size=self.tasks_at_once, randomness=self.randomness)
        try:
            return mapped(*flat)
        except (RuntimeError, ValueError) as error:
            task_count(w, batch)
            if not _cannot_be_vmapped(error):
                raise
            raise RuntimeError(f"vmapped: torch.vmap cannot run this loss ({error}); take mo.looped(loss)") from error


@dataclass(frozen=True)
class Looped(TaskLoss):
    """One task after the other; see :func:`looped`."""

    @override
    def over_tasks(self, fn: Callable[[Tree, Tree, Any], Any], w: Tree, lam: Tree, batch: Any) -> Any:
        tasks = task_count(w, batch)
        weights = _rows(w, tasks)
        batches = batch.batches if isinstance(batch, Ragged) else _rows(batch, tasks)
        found = [fn(w_i, lam, batch_i) for w_i, batch_i in zip(weights, batches, strict=True)]
        return tree.map(lambda *rows: torch.stack(rows), *found)


def is_stacked(step_or_loss: Any) -> bool:
    """Whether the weights of this step or loss have a task axis first."""
    return getattr(step_or_loss, "stacked", False)


def task_count(w: Tree, batch: Any) -> int:
    """How many tasks ``w`` and ``batch`` hold, the weights' word first.

    Raises:
        ValueError: if not every tensor has that many rows.
    """
    tasks = _first_size(w)
    if tasks is None:
        raise ValueError("a weight without axes cannot hold a row for each task: start from mo.replicated(w, tasks)")
    _check_rows(w, tasks, "weight")
    if isinstance(batch, Ragged) and len(batch.batches) != tasks:
        raise ValueError(f"the weights hold {tasks} tasks, but Ragged holds {len(batch.batches)} batches")
    _check_rows(batch, tasks, "batch")
    return tasks


def for_all_tasks(step: Any, w0: Tree, batch: Any) -> Tree:
    """The initial weights as a step of stacked tasks wants them: weights of one task are given to each.

    Differentiable in ``w0``. Whatever else ``w0`` is (an :class:`InnerState`, :class:`Stacked`
    weights, or weights for a step of one task) is taken as it is.

    Args:
        step: Φ.
        w0: initial weights.
        batch: the first batch, whose tensors say how many tasks there are.

    Raises:
        ValueError: if the number of tasks cannot be read off the batch; or if every weight happens to
            have as many rows as there are tasks, so that both readings are possible.
    """
    if isinstance(w0, Stacked):
        return w0.w
    if isinstance(w0, InnerState) or not is_stacked(step):
        return w0
    tasks = len(batch.batches) if isinstance(batch, Ragged) else _first_size(batch)
    if tasks is None:
        raise ValueError(
            "the number of tasks cannot be read off the first batch, which holds no tensor: say it, "
            "mo.replicated(w0, tasks)"
        )
    if all(leaf.shape[:1] == (tasks,) for leaf in tree.leaves(w0) if isinstance(leaf, Tensor)):
        raise ValueError(
            f"every weight in w0 has {tasks} rows, and there are {tasks} tasks. Say which is meant: mo.Stacked(w0) "
            f"holds a row for each task, mo.replicated(w0, {tasks}) starts every task from all of w0"
        )
    return replicated(w0, tasks).w


def _first_size(stacked: Tree) -> int | None:
    for leaf in tree.leaves(stacked):
        if isinstance(leaf, Tensor):
            return leaf.shape[0] if leaf.ndim else None
    return None


def _check_rows(stacked: Tree, tasks: int, what: str) -> None:
    for i, leaf in enumerate(tree.leaves(stacked)):
        if isinstance(leaf, Tensor) and leaf.shape[:1] != (tasks,):
            _refuse_rows(what, tree.names(stacked)[i], leaf, tasks)


def _refuse_rows(what: str, name: str, leaf: Tensor, tasks: int) -> NoReturn:
    raise ValueError(
        f"a meta-batch of {tasks} tasks has them on the first axis of every tensor; the {what} {name} has shape "
        f"{tuple(leaf.shape)}. Weights of one task: mo.replicated(w, tasks). Tasks of different sizes: "
        "mo.looped(loss) on mo.meta.Ragged(batches)"
    )


def _rows(stacked: Tree, tasks: int) -> list[Tree]:
    """One tree per task; leaves that are not tensors are shared."""
    flat, spec = tree.flatten(stacked)
    columns = [leaf.unbind(0) if isinstance(leaf, Tensor) else (leaf,) * tasks for leaf in flat]
    return [tree.unflatten(row, spec) for row in zip(*columns, strict=True)]


def _cannot_be_vmapped(error: Exception) -> bool:
    message = str(error)
    return "Batching rule not implemented" in message or message.startswith("vmap: ")
