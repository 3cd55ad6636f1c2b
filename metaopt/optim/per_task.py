"""Optimisers that look at whole tensors, in a stacked meta-batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from metaopt import tree
from metaopt.optim.wrapper import Wrapper
from metaopt.tree import Tree


@dataclass(frozen=True)
class PerTask(Wrapper):
    """The wrapped optimiser, mapped over the leading task axis of all weights.

    Element-wise optimisers need no wrapping. Those that take norms or products of whole tensors
    (:class:`ClipNorm`, :class:`Adafactor`, :class:`Muon`, :class:`Precondition`) would mix the
    tasks of a stacked meta-batch without it. :func:`metaopt.inner_step` puts it around them where
    the loss is stacked.

    >>> import torch
    >>> from metaopt.optim import SGD, ClipNorm
    >>> two_tasks = torch.tensor([[3.0, 4.0], [0.6, 0.8]])
    >>> optimizer = PerTask(ClipNorm(SGD(lr=1.0), max_norm=1.0))
    >>> optimizer.update(two_tasks, torch.zeros(2, 2), optimizer.init(two_tasks), None, 1)[0]
    tensor([[-0.6000, -0.8000],
            [-0.6000, -0.8000]])
    """

    @property
    @override
    def elementwise(self) -> bool:
        return True

    def init(self, w: Tree) -> Tree:
        """The wrapped optimiser's slots, one per task.

        Raises:
            ValueError: if the weights have no common leading axis.
        """
        shapes = [tuple(leaf.shape) for leaf in tree.leaves(w)]
        axes = {shape[:1] for shape in shapes}
        if len(axes) > 1 or () in axes:
            shapes = dict(zip(tree.names(w), shapes, strict=True))
            raise ValueError(f"PerTask: all weights need the same leading task axis, their shapes are {shapes}")
        return {"inner": _over_tasks(self.optimizer.init, w)}

    @override
    def update(self, g: Tree, w: Tree, slots: Tree, lam: Tree, t: int) -> tuple[Tree, Tree]:
        def update_one(g: Tree, w: Tree, inner: Tree) -> tuple[Tree, Tree]:
            return self.optimizer.update(g, w, inner, lam, t)

        w, inner = _over_tasks(update_one, g, w, slots["inner"])
        return w, {"inner": inner}


def _over_tasks(fn: Callable[..., Tree], *arguments: Tree) -> Tree:
    """``torch.vmap`` of a function of trees; what is not a tensor is shared by all tasks."""
    flat, spec = tree.flatten(arguments)
    is_tensor = [isinstance(leaf, Tensor) for leaf in flat]
    shared: list[Any] = []
    specs: list[tree.Spec] = []

    def tensors_alone(*tensors: Tensor) -> tuple[Tensor, ...]:
        supply = iter(tensors)
        full = [next(supply) if mapped else leaf for mapped, leaf in zip(is_tensor, flat, strict=True)]
        arguments = tree.unflatten(full, spec)
        out, out_spec = tree.flatten(fn(*arguments))
        shared.extend([None if isinstance(leaf, Tensor) else (leaf,) for leaf in out])
        specs.append(out_spec)
        return tuple([leaf for leaf in out if isinstance(leaf, Tensor)])

    tensors = [leaf for leaf in flat if isinstance(leaf, Tensor)]
    mapped = iter(torch.vmap(tensors_alone)(*tensors))
    full = [next(mapped) if leaf is None else leaf[0] for leaf in shared]
    return tree.unflatten(full, specs[0])
