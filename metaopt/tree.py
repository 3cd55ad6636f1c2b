"""Pytree arithmetic: the one file that knows how nested containers of tensors are walked.

A *pytree* is a tensor, or any nesting of dicts, lists, tuples and NamedTuples with tensors at its leaves. Leaves that are not
floating-point tensors (step counters, masks, ``None``) ride along: arithmetic leaves them as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Tree: TypeAlias = Any
Spec: TypeAlias = Any


def flatten(tree: Tree) -> tuple[list[Any], Spec]:
    """Leaves in order, and the structure that :func:`unflatten` needs to put them back."""
    return pytree.tree_flatten(tree)


def unflatten(leaves_: Iterable[Any], spec: Spec) -> Tree:
    """Inverse of :func:`flatten`."""
    return pytree.tree_unflatten(list(leaves_), spec)


def leaves(tree: Tree) -> list[Any]:
    """All leaves, in order."""
    return pytree.tree_leaves(tree)


def map(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """``fn`` applied leaf by leaf; the trees must have one structure."""
    return pytree.tree_map(fn, tree, *rest)


def names(tree: Tree) -> list[str]:
    """One readable path per leaf, as a user would write it: ``['conv.weight']``, ``.slots['momentum']``."""
    return [pytree.keystr(path) or "(the leaf itself)" for path, _ in pytree.tree_flatten_with_path(tree)[0]]


def is_float(leaf: Any) -> bool:
    """Whether a leaf can carry a derivative: a tensor of real floating-point numbers."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def floats(tree: Tree) -> list[Tensor]:
    """The leaves that can carry a derivative, in order."""
    return [leaf for leaf in leaves(tree) if is_float(leaf)]


def detach(tree: Tree) -> Tree:
    """The same values, cut off from any autograd graph (no copy)."""
    return map(lambda x: x.detach() if isinstance(x, Tensor) else x, tree)


def clone(tree: Tree) -> Tree:
    """An independent, detached copy."""
    return map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, tree)


def attach(tree: Tree) -> Tree:
    """The same values as fresh autograd leaves, so that a derivative with respect to them can be asked for."""
    return map(lambda x: x.detach().requires_grad_() if is_float(x) else x, tree)


def requires_grad(tree: Tree) -> bool:
    """Whether any leaf is already part of an autograd graph."""
    return any(isinstance(x, Tensor) and x.requires_grad for x in leaves(tree))


def zeros_like(tree: Tree) -> Tree:
    """Zeros in place of every floating-point leaf."""
    return map(lambda x: torch.zeros_like(x) if is_float(x) else x, tree)


def add(a: Tree, b: Tree) -> Tree:
    """``a + b``; a missing leaf (``None``) counts as zero."""
    return map(_plus, a, b)


def _plus(x: Any, y: Any) -> Any:
    if x is None:
        return y
    return x + y if y is not None and is_float(x) else x


def sub(a: Tree, b: Tree) -> Tree:
    """``a - b``."""
    return map(lambda x, y: x - y if is_float(x) else x, a, b)


def scale(factor: float | Tensor, a: Tree) -> Tree:
    """``factor * a``; a missing leaf (``None``) stays missing."""
    return map(lambda x: factor * x if is_float(x) else x, a)


def lerp(a: Tree, b: Tree, weight: float) -> Tree:
    """``(1 - weight) a + weight b``; leaves that are no real numbers come from ``b``."""
    return map(lambda x, y: torch.lerp(x, y, weight) if is_float(x) else y, a, b)


def dot(a: Tree, b: Tree) -> Tensor:
    """Inner product over all floating-point leaves (a missing leaf counts as zero)."""
    pairs = [(x, y) for x, y in zip(leaves(a), leaves(b), strict=True) if is_float(x) and is_float(y)]
    if not pairs:
        return torch.zeros(())
    return torch.stack([(x * y).sum() for x, y in pairs]).sum()


def norm(a: Tree) -> Tensor:
    """Euclidean norm over all floating-point leaves."""
    return dot(a, a).sqrt()


def filled(tree: Tree, like: Tree) -> Tree:
    """``tree`` with zeros where a leaf is missing (``None``)."""
    return map(lambda x, y: torch.zeros_like(y) if x is None else x, tree, like)


def is_finite(tree: Tree) -> bool:
    """Whether every number in the tree is finite."""
    return all(bool(torch.isfinite(x).all()) for x in floats(tree))


def first_non_finite(tree: Tree) -> str | None:
    """The path of the first leaf that holds a NaN or an infinity, if any does."""
    for name, leaf in zip(names(tree), leaves(tree), strict=True):
        if is_float(leaf) and not bool(torch.isfinite(leaf).all()):
            return name
    return None


def check_like(tree: Tree, reference: Tree, what: str, reference_what: str) -> None:
    """Raise a ``ValueError`` that names the first difference in structure, shape, dtype or device.

    >>> check_like({"a": torch.ones(2)}, {"a": torch.ones(3)}, "alpha", "w")
    Traceback (most recent call last):
        ...
    ValueError: alpha does not match w at ['a']: shape (2,) against (3,)
    """
    mine, spec = flatten(tree)
    theirs, reference_spec = flatten(reference)
    if spec != reference_spec:
        only = sorted(set(names(tree)) ^ set(names(reference)))
        raise ValueError(f"{what} and {reference_what} have different structures; they differ at {only[:4] or spec}")
    for name, x, y in zip(names(reference), mine, theirs, strict=True):
        for attribute in ("shape", "dtype", "device"):
            got, want = getattr(x, attribute, None), getattr(y, attribute, None)
            if got != want:
                shown = (tuple(got), tuple(want)) if attribute == "shape" and got is not None and want is not None else (got, want)
                raise ValueError(f"{what} does not match {reference_what} at {name}: {attribute} {shown[0]} against {shown[1]}")


def stack(trees: Sequence[Tree]) -> Tree:
    """Trees of one structure as one tree whose leaves have a new leading axis."""
    return map(lambda *xs: torch.stack(xs), *trees)


def select(tree: Tree, index: Any) -> Tree:
    """``leaf[index]`` for every tensor leaf."""
    return map(lambda x: x[index] if isinstance(x, Tensor) else x, tree)
