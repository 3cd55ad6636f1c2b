"""Walks over autograd's graph: about a microsecond a node."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor


def nodes(outputs: Iterable[Tensor | None], until: Iterable[Tensor] = ()) -> Iterator[Any]:
    """Every node behind ``outputs``, once each; the walk stops at the nodes that made ``until``."""
    seen: set[Any] = {x.grad_fn for x in until}
    waiting: list[Any] = [x.grad_fn for x in outputs if x is not None]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [parent for parent, _ in node.next_functions]


def leaves(of: Iterable[Any]) -> list[Tensor]:
    """The autograd leaves among nodes."""
    return [node.variable for node in of if hasattr(node, "variable")]


def numbers_saved(outputs: Iterable[Tensor]) -> int:
    """How many numbers the graph behind some tensors has saved: what one product reads."""
    names: dict[type, list[str]] = {}
    total = 0
    for node in nodes(outputs):
        saved = names.setdefault(type(node), [name for name in dir(type(node)) if name.startswith("_saved_")])
        tensors = [getattr(node, name) for name in saved]
        total += sum(x.numel() for x in tensors if isinstance(x, Tensor))
    return total


def check_twice_differentiable(gradients: Iterable[Tensor | None], inputs: Iterable[Tensor] = ()) -> None:
    """Walk the graph from gradients to the inputs.

    An operation whose backward is marked ``once_differentiable`` leaves an error node there, from
    which no path leads to an input. Autograd would leave it out without a word, and every
    second-order product would miss what passes through it.

    Raises:
        RuntimeError: if there is such a node.
    """
    for node in nodes(gradients, inputs):
        _check(node.name())


def can_be_batched(gradients: Iterable[Tensor | None]) -> bool:
    """Whether torch takes many products of these gradients at once, and takes them rightly.

    It is found on the same walk.

    Raises:
        RuntimeError: if an operation is differentiable once only.
    """
    right = True
    for node in nodes(gradients):
        name = node.name()
        _check(name)
        if name.startswith(_WRONG_WHEN_BATCHED):
            right = False
    return right


# torch 2.13: group norm's derivative reshapes batched gradients as if they were one, an error for most
# shapes and a wrong number for the others.
_WRONG_WHEN_BATCHED = "NativeGroupNormBackward"


def _check(name: str) -> None:
    if name.endswith("Error"):
        raise RuntimeError(
            "an operation of the inner step is differentiable once only (its backward is marked "
            "once_differentiable): a hypergradient would miss what passes through it. Write its backward in "
            "operations of torch, without that mark, or use another form of it"
        )
