"""Forward mode: the response itself, rolled forward beside the state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from metaopt import checks, tree
from metaopt.estimators.base import Estimator, Pullback, Response, Traits
from metaopt.inner.contract import Linearized, Step
from metaopt.inner.state import InnerState
from metaopt.tree import Tree


class ForwardCarry(NamedTuple):
    """What forward mode carries along.

    Attributes:
        Z: ``ds_t/dλ``, a state whose floating-point leaves are ``[|λ|, *leaf.shape]``: one column
            per entry of λ.
        basis: the columns in λ itself, a pytree like λ with leaves ``[|λ|, *leaf.shape]``.
        used: for every leaf of λ, whether Φ has been seen to depend on it.
        columns_at_once: columns per batched product; ``None`` until the first step has been seen.
    """

    Z: InnerState
    basis: Tree
    used: tuple[bool, ...]
    columns_at_once: int | None


class ForwardMode(Estimator):
    """The recursion; what is made of its result is the method.

    Attributes:
        columns_at_once: columns per batched product; ``None``: by the size of the graph.
    """

    columns_at_once: int | None = None

    @property
    def bound_on_products(self) -> float | None:
        """Elementwise bound on the tangents of the inner gradient."""
        return None

    @override
    def init(self, step: Step, state: InnerState, lam: Tree) -> ForwardCarry:
        columns = sum(leaf.numel() for leaf in tree.floats(lam))
        Z = tree.map(lambda x: x.new_zeros(columns, *x.shape) if tree.is_float(x) else x, state)
        return ForwardCarry(Z, basis_of(lam), (False,) * len(tree.leaves(lam)), self.columns_at_once)

    def advance(
        self, step: Step, state: InnerState, lam: Tree, batch: Any, carry: ForwardCarry
    ) -> tuple[InnerState, ForwardCarry]:
        """A step, and ``Z ← A Z + B`` from its graph."""
        point = step.linearize(state, lam, batch)
        at_once = carry.columns_at_once
        if at_once is None:
            at_once = point.columns_at_once
        Z = point.pushforward(carry.Z, carry.basis, columns_at_once=at_once, bound=self.bound_on_products)
        used = carry.used if all(carry.used) else _seen(carry.used, Z, point, state, lam)
        return point.state, ForwardCarry(Z, carry.basis, used, at_once)

    def respond(self, step: Step, state: InnerState, lam: Tree, carry: ForwardCarry) -> tuple[Tree, Pullback]:
        """The weights, and ``α ↦ α Z``."""

        def pullback(alpha: Tree) -> Response:
            tree.check_like(alpha, state.w, "alpha", "w")
            return Response(_entries(_times(alpha, carry.Z.w), lam, carry.used))

        return state.w, pullback


@dataclass(frozen=True)
class FMD(ForwardMode):
    r"""Forward-mode differentiation: the exact hypergradient, at any time, without remembering the run.

    .. math::
        Z_t = A_t Z_{t-1} + B_t, \qquad Z_t = \frac{d s_t}{d\lambda}, \qquad
        \frac{d L_{val}}{d\lambda} = \frac{\partial L_{val}}{\partial\lambda} + \alpha_T Z_T

    Franceschi et al. 2017, "Forward and reverse gradient-based hyperparameter optimization", `arXiv
    1703.01785 <https://arxiv.org/abs/1703.01785>`__.

    Cost: per inner step one gradient with its graph (with respect to ``(w, λ)``), and one
    second-order product of that graph per column of Z that needs one: a hyperparameter of the
    optimiser alone needs none until it has moved the weights, and before any has (at the first
    step) products are of first order. Memory: ``|λ|`` states (weights and slots), ``|λ|²`` numbers,
    the graph of one gradient; constant in the horizon. Bias: exact. There is no cotangent of the
    initial weights.

    Online, λ may move: then ``α Z_t`` is the exact derivative with respect to a shift that all λ of
    the run have in common, ``Σ_i α A_t … A_{i+1} B_i`` with each Jacobian at the λ of its own step.

    >>> import torch, metaopt as mo
    >>> step = mo.inner_step(lambda w, lam, _: 0.5 * ((w - lam) ** 2).sum(), mo.optim.SGD(lr=0.5))
    >>> problem = mo.Problem(step, lambda w, lam, _: w.sum(), torch.zeros(1), torch.ones(1), [None] * 2, None)
    >>> problem.hypergradient(FMD()).total
    tensor([0.7500])

    Args:
        columns_at_once: columns per batched product: 1 takes them one after the other (least memory),
            more save calls; default: as many as keep a batch small, by the size of the graph. The
            result is the same up to rounding.

    Raises:
        ValueError: for less than one column at once.
    """

    traits: ClassVar[Traits] = Traits(
        sees="the whole run", high_dimensional=False, bias="none (online: the past λ's Jacobians)"
    )
    exact = True

    columns_at_once: int | None = None

    def __post_init__(self) -> None:
        check_columns(self, self.columns_at_once)


def check_columns(owner: object, columns_at_once: int | None) -> None:
    """A number of columns, or ``None``."""
    if columns_at_once is not None:
        checks.count(owner, "columns_at_once", columns_at_once)


def basis_of(lam: Tree) -> Tree:
    """The identity: one column per entry of λ, as a pytree like λ with leaves ``[|λ|, *leaf.shape]``."""
    flat, spec = tree.flatten(lam)
    columns = sum(leaf.numel() for leaf in flat)
    first = 0
    leaves = []
    for leaf in flat:
        eye = torch.zeros(columns, leaf.numel(), dtype=leaf.dtype, device=leaf.device)
        eye[first : first + leaf.numel()].fill_diagonal_(1.0)
        leaves.append(eye.reshape(columns, *leaf.shape))
        first += leaf.numel()
    return tree.unflatten(leaves, spec)


def _times(alpha: Tree, Z: Tree) -> Tensor:
    """``α Z``, one number per column."""
    parts = [
        columns.unsqueeze(-1).flatten(1) @ a.flatten()
        for a, columns in zip(tree.leaves(alpha), tree.leaves(Z), strict=True)
    ]
    return torch.stack([part.to(parts[0]) for part in parts]).sum(0)


def _entries(columns: Tensor, lam: Tree, used: tuple[bool, ...]) -> Tree:
    """One number per column as a pytree like λ; ``None`` where Φ does not depend on the leaf."""
    flat, spec = tree.flatten(lam)
    parts = columns.split([leaf.numel() for leaf in flat])
    return tree.unflatten(
        [
            part.reshape(leaf.shape).to(leaf) if seen else None
            for part, leaf, seen in zip(parts, flat, used, strict=True)
        ],
        spec,
    )


def _seen(used: tuple[bool, ...], Z: InnerState, point: Linearized, state: InnerState, lam: Tree) -> tuple[bool, ...]:
    """``used``, brought up to date: a leaf is used if it has moved the state, or else if Φ's own pullback knows it."""
    flat = tree.leaves(lam)
    by_leaf = [columns.unsqueeze(-1).flatten(1).any(1) for columns in tree.floats(Z)]
    moved = torch.stack(by_leaf).any(0)
    columns_of = moved.split([leaf.numel() for leaf in flat])
    now = tuple(before or bool(column.any()) for before, column in zip(used, columns_of, strict=True))
    if all(now):
        return now
    zero = InnerState(tree.zeros_like(state.w), None, state.t)
    _, lam_bar = point.pullback(zero, "lam")
    return tuple(before or bar is not None for before, bar in zip(now, tree.leaves(lam_bar), strict=True))
