"""Pytree arithmetic: the one file that knows how nested containers of tensors are walked.

A *pytree* is a tensor, or any nesting of dicts, lists, tuples and NamedTuples with tensors at its
leaves. Leaves that are not floating-point tensors (step counters, masks, ``None``) ride along:
arithmetic leaves them as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Tree: TypeAlias = Any


class Spec:
    """The structure of a tree: what :func:`unflatten` needs.

    It refers to the tree it was read from, so do not store it for long.
    """

    __slots__ = ("like", "num_leaves")

    def __init__(self, like: Tree, num_leaves: int) -> None:
        self.like = like
        self.num_leaves = num_leaves

    def __eq__(self, other: object) -> bool:
        """Whether both trees have the same containers with the same keys."""
        return isinstance(other, Spec) and (
            self.like is other.like or pytree.tree_structure(self.like) == pytree.tree_structure(other.like)
        )

    def __hash__(self) -> int:
        return hash(self.num_leaves)

    def __repr__(self) -> str:
        return repr(pytree.tree_structure(self.like))


def flatten(tree: Tree) -> tuple[list[Any], Spec]:
    """Leaves in order, and the structure that :func:`unflatten` needs to put them back."""
    flat = leaves(tree)
    return flat, Spec(tree, len(flat))


def unflatten(leaves_: Iterable[Any], spec: Spec) -> Tree:
    """The tree of a structure with these leaves: the inverse of :func:`flatten`."""
    supply = iter(leaves_)
    return map(lambda _: next(supply), spec.like)


def leaves_like(tree: Tree, spec: Spec) -> list[Any]:
    """The leaves in the order of ``spec``: those of a dict by key, whatever the order of its keys is.

    >>> leaves_like({"b": 2, "a": 1}, flatten({"a": 0, "b": 0})[1])
    [1, 2]

    Raises:
        ValueError: if the tree has another structure.
    """
    found: list[Any] = []
    try:
        map(lambda _, leaf: found.append(leaf), spec.like, tree)
    except (ValueError, TypeError):
        found = []
    if len(found) != spec.num_leaves or any(_kind(type(leaf)) != _LEAF for leaf in found):
        raise ValueError(f"its leaves are {names(tree)}, wanted are {names(spec.like)}")
    return found


# Trees are walked millions of times, and torch's general walk would cost a small run a third of its
# time. So the walk is written here. The kind of every type is looked up once.
_LEAF, _DICT, _SEQUENCE, _NAMEDTUPLE, _OTHER = range(5)
_KINDS: dict[type, int] = {Tensor: _LEAF, dict: _DICT, list: _SEQUENCE, tuple: _SEQUENCE, int: _LEAF, type(None): _LEAF}


def _kind(cls: type) -> int:
    kind = _KINDS.get(cls)
    if kind is None:
        if pytree.is_namedtuple_class(cls):
            kind = _NAMEDTUPLE
        else:
            kind = _OTHER if cls in pytree.SUPPORTED_NODES else _LEAF
        _KINDS[cls] = kind
    return kind


def leaves(tree: Tree) -> list[Any]:
    """The leaves of a tree, in the order in which its containers hold them."""
    out: list[Any] = []
    _collect(tree, out)
    return out


def _collect(tree: Tree, out: list[Any]) -> None:
    kind = _kind(type(tree))
    if kind == _LEAF:
        out.append(tree)
        return
    if kind == _DICT:
        tree = tree.values()
    elif kind == _OTHER:
        tree = pytree.SUPPORTED_NODES[type(tree)].flatten_fn(tree)[0]
    for child in tree:
        if _KINDS.get(type(child)) == _LEAF:  # most children are: no call for those
            out.append(child)
        else:
            _collect(child, out)


def map(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """``fn`` applied leaf by leaf.

    The trees must have one structure; a leaf of the first may stand for a subtree of the others.

    Raises:
        ValueError: if their structures differ.
    """
    return _mapped_with(fn, tree, rest) if rest else _mapped(fn, tree)


def _mapped(fn: Callable[..., Any], tree: Tree) -> Tree:
    kind = _kind(type(tree))
    if kind == _LEAF:
        return fn(tree)
    if kind == _OTHER:
        return pytree.tree_map(fn, tree)
    if kind == _DICT:
        return {
            key: fn(child) if _KINDS.get(type(child)) == _LEAF else _mapped(fn, child) for key, child in tree.items()
        }
    children = [fn(child) if _KINDS.get(type(child)) == _LEAF else _mapped(fn, child) for child in tree]
    return type(tree)(*children) if kind == _NAMEDTUPLE else type(tree)(children)


def _mapped_with(fn: Callable[..., Any], tree: Tree, rest: Sequence[Tree]) -> Tree:
    cls = type(tree)
    kind = _kind(cls)
    if kind == _LEAF:
        return fn(tree, *rest)
    for other in rest:
        if kind == _OTHER or type(other) is not cls or len(other) != len(tree):
            return pytree.tree_map(fn, tree, *rest)
        if kind == _DICT and other.keys() != tree.keys():
            keys = [list(other) for other in (tree, *rest)]
            raise ValueError(f"the trees have different keys: {keys}")
    if kind == _DICT:
        mapped = {}
        for key, child in tree.items():
            mapped[key] = _mapped_with(fn, child, [other[key] for other in rest])
        return mapped
    children = [_mapped_with(fn, child, others) for child, *others in zip(tree, *rest, strict=True)]
    return cls(*children) if kind == _NAMEDTUPLE else cls(children)


def names(tree: Tree) -> list[str]:
    """One readable path per leaf, as a user would write it: ``['conv.weight']``, ``.slots['momentum']``."""
    return [pytree.keystr(path) or "(the leaf itself)" for path, _ in pytree.tree_flatten_with_path(tree)[0]]


def dotted_names(tree: Tree) -> list[str]:
    """One name per leaf, keys and indices joined by dots: ``0.weight``.

    >>> dotted_names({"0.weight": 1, "head": [2, 3]})
    ['0.weight', 'head.0', 'head.1']
    """
    return [".".join(_entries(path)) for path, _ in pytree.tree_flatten_with_path(tree)[0]]


def _entries(path: Iterable[Any]) -> list[str]:
    entries: list[str] = []
    for key in path:
        index_or_name = getattr(key, "idx", getattr(key, "name", key))
        entries.append(str(getattr(key, "key", index_or_name)))
    return entries


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a dotted name matches one of the glob patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def matching(names: Iterable[str], patterns: str | Sequence[str] | Callable[[str], bool], what: str) -> list[str]:
    """The names that match one of the glob patterns, or that the predicate holds for, in their order.

    Args:
        names: dotted names.
        patterns: one glob, several, or a predicate on the name.
        what: the kind of thing that is named, for the error.

    Raises:
        ValueError: if a pattern matches no name.

    >>> matching(["body.weight", "head.weight"], "head.*", "parameter")
    ['head.weight']
    """
    names = list(names)
    if callable(patterns):
        return [name for name in names if patterns(name)]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"the pattern {pattern!r} matches no {what}; names are {names}")
    return [name for name in names if matches(name, patterns)]


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
    """A copy with its own memory, cut off from any autograd graph."""
    return map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, tree)


def to(tree: Tree, where: torch.device | torch.dtype | str) -> Tree:
    """Weights, λ or a batch on another device, or with floating-point tensors in another dtype.

    >>> to({"x": torch.zeros(2), "n": torch.tensor(3)}, torch.float64)
    {'x': tensor([0., 0.], dtype=torch.float64), 'n': tensor(3)}
    """
    if isinstance(where, torch.dtype):
        return map(lambda x: x.to(where) if is_float(x) else x, tree)
    return map(lambda x: x.to(where) if isinstance(x, Tensor) else x, tree)


def attach(tree: Tree) -> Tree:
    """The same values as fresh autograd leaves, so that a derivative with respect to them can be asked for."""
    return attached(tree)[0]


def attached(tree: Tree) -> tuple[Tree, list[Tensor]]:
    """:func:`attach`, and the new autograd leaves in order."""
    fresh: list[Tensor] = []

    def attach_leaf(x: Any) -> Any:
        if not is_float(x):
            return x
        x = x.detach().requires_grad_()
        fresh.append(x)
        return x

    return map(attach_leaf, tree), fresh


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


def accumulate(total: Tree, b: Tree) -> Tree:
    """``total + b``, written into ``total``'s own tensors.

    A missing leaf (``None``) becomes a copy of that of ``b``. Half precision is summed in float32.
    """
    sums: list[Tensor] = []
    terms: list[Tensor] = []
    for x, y in zip(leaves(total), leaves(b), strict=True):
        if is_float(y):
            if x is None:
                return map(_accumulated, total, b)
            sums.append(x)
            terms.append(y)
    if terms:
        torch._foreach_add_(sums, terms)  # pyright: ignore[reportPrivateImportUsage]  (one call)
    return total


def _accumulated(x: Any, y: Any) -> Any:
    if y is None or not is_float(y):
        return x
    if x is None:
        return y.to(torch.promote_types(y.dtype, torch.float32), copy=True)
    return x.add_(y)


def sub(a: Tree, b: Tree) -> Tree:
    """``a - b``, leaf by leaf; leaves that are not real numbers come from ``a``."""
    return map(lambda x, y: x - y if is_float(x) else x, a, b)


def scale(factor: float | Tensor, a: Tree) -> Tree:
    """``factor * a``; a missing leaf (``None``) stays missing."""
    return map(lambda x: factor * x if is_float(x) else x, a)


def lerp(a: Tree, b: Tree, weight: float) -> Tree:
    """``(1 - weight) a + weight b``; leaves that are not real numbers come from ``b``."""
    return map(lambda x, y: torch.lerp(x, y, weight) if is_float(x) else y, a, b)


def dot(a: Tree, b: Tree) -> Tensor:
    """Inner product over all floating-point leaves (a missing leaf counts as zero)."""
    pairs = zip(leaves(a), leaves(b), strict=True)
    terms = [(x * y).sum() for x, y in pairs if is_float(x) and is_float(y)]
    if not terms:
        return torch.zeros(())
    return torch.stack(terms).sum()


def norm(a: Tree) -> Tensor:
    """Euclidean norm over all floating-point leaves."""
    return dot(a, a).sqrt()


def vector(tree: Tree) -> Tensor:
    """All floating-point leaves as one vector."""
    return torch.cat([leaf.reshape(-1) for leaf in floats(tree)])


def unvector(flat: Tensor, like: Tree) -> Tree:
    """Inverse of :func:`vector`; other leaves come from ``like``."""
    supply = iter(flat.split([leaf.numel() for leaf in floats(like)]))
    return map(lambda x: next(supply).reshape(x.shape).to(x.dtype) if is_float(x) else x, like)


def filled(tree: Tree, like: Tree) -> Tree:
    """``tree`` with zeros where a leaf is missing (``None``)."""
    return map(lambda x, y: torch.zeros_like(y) if x is None and is_float(y) else x, tree, like)


def is_finite(tree: Tree) -> bool:
    """Whether every number in the tree is finite."""
    sums = [x.sum() for x in floats(tree)]
    return not sums or bool(torch.isfinite(torch.stack(sums)).all()) or first_non_finite(tree) is None


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
    for number, (x, y) in enumerate(zip(mine, theirs, strict=True)):
        for attribute in ("shape", "dtype", "device"):
            got = getattr(x, attribute, None)
            want = getattr(y, attribute, None)
            if got != want:
                name = names(reference)[number]
                got = tuple(got) if isinstance(got, torch.Size) else got
                want = tuple(want) if isinstance(want, torch.Size) else want
                raise ValueError(f"{what} does not match {reference_what} at {name}: {attribute} {got} against {want}")


def stack(trees: Sequence[Tree]) -> Tree:
    """Trees of one structure as one tree whose leaves have a new leading axis."""
    return map(lambda *xs: torch.stack(xs), *trees)


def select(tree: Tree, index: Any) -> Tree:
    """``leaf[index]`` for every tensor leaf."""
    return map(lambda x: x[index] if isinstance(x, Tensor) else x, tree)
