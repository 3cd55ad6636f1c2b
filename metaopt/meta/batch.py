"""A meta-batch as one stacked problem: weights and batches with a leading task axis, losses mapped over it and summed.

Tasks are independent, so the stacked problem's Jacobian is block-diagonal and every estimator works
on it unchanged; the hypergradient with respect to the shared λ is the sum over tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metaopt import tree
from metaopt.tree import Tree

Loss = Callable[[Tree, Tree, Any], Tensor]


def stacked(loss: Loss, *, chunk_size: int | None = None, randomness: str = "different") -> Loss:
    """The sum over tasks of ``loss(w[i], lam, batch[i])``, as one loss of the stacked ``w`` and ``batch``.

    Args:
        loss: ``(w, lam, batch) -> scalar`` of one task.
        chunk_size: tasks computed at a time; default all. The graphs of all are kept none the less:
            to hold fewer, :func:`in_task_chunks`.
        randomness: of dropout across tasks, as in :func:`torch.vmap`.
    """

    def total(w: Tree, lam: Tree, batch: Any) -> Tensor:
        flat, spec = tree.flatten((w, batch))

        def one(*leaves: Any) -> Tensor:
            w_i, batch_i = tree.unflatten(leaves, spec)
            return loss(w_i, lam, batch_i)

        return torch.vmap(one, chunk_size=chunk_size, randomness=randomness)(*flat).sum()

    return total


def looped(loss: Loss) -> Loss:
    """As :func:`stacked`, one task after the other.

    The faster of the two for convolutions on a CPU, and for whatever cannot be vmapped.

    Memory: the graphs of all tasks, as in :func:`stacked`.

    Args:
        loss: ``(w, lam, batch) -> scalar`` of one task.
    """

    def total(w: Tree, lam: Tree, batch: Any) -> Tensor:
        tasks = tree.leaves(w)[0].shape[0]
        parts = zip(_per_task(w, tasks), _per_task(batch, tasks), strict=True)
        return torch.stack([loss(w_i, lam, batch_i) for w_i, batch_i in parts]).sum()

    return total


def _per_task(stacked_tree: Tree, tasks: int) -> list[Tree]:
    """One tree per task; leaves that are no tensors are shared.

    Raises:
        ValueError: if a tensor's first axis is not the tasks'.
    """
    flat, spec = tree.flatten(stacked_tree)
    for i, leaf in enumerate(flat):
        if isinstance(leaf, Tensor) and leaf.shape[:1] != (tasks,):
            name = tree.names(stacked_tree)[i]
            raise ValueError(
                f"a meta-batch of {tasks} tasks has them on the first axis of every tensor; {name} has shape "
                f"{tuple(leaf.shape)}"
            )
    columns = [leaf.unbind(0) if isinstance(leaf, Tensor) else (leaf,) * tasks for leaf in flat]
    return [tree.unflatten([column[i] for column in columns], spec) for i in range(tasks)]


def replicated(w: Tree, tasks: int) -> Tree:
    """One copy of ``w`` per task, on a new leading axis."""
    if tasks < 1:
        raise ValueError(f"a meta-batch needs at least one task, got {tasks}")
    return tree.map(lambda x: x.detach().unsqueeze(0).expand(tasks, *x.shape).clone(), w)
