"""Learned gradient transforms: the gradient goes through a map whose parameters are part of λ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from metaopt import checks, tree
from metaopt.optim.optimizer import Check, Optimizer
from metaopt.optim.wrapper import Wrapper
from metaopt.tree import Tree


@dataclass(frozen=True)
class Precondition(Wrapper):
    r"""The wrapped optimiser gets ``transform(g, lam, t)``.

    Meta-Curvature multiplies each weight matrix's gradient from both sides, :math:`G \mapsto M_o\,
    G\, M_i` (Park and Oliva 2019, `arXiv 1902.03356 <https://arxiv.org/abs/1902.03356>`__); KFO is
    the same with one network for all (Arnold et al. 2021, `arXiv 1910.13603
    <https://arxiv.org/abs/1910.13603>`__).

    Args:
        optimizer: gets the transformed gradient.
        transform: ``(g, lam, t) -> g``; differentiated with respect to both.

    Raises:
        ValueError: if the transform changes structure or shapes.

    >>> import metaopt as mo, torch
    >>> rule = mo.optim.Precondition(mo.optim.SGD(lr=0.1), lambda g, lam, t: lam * g)
    >>> step = mo.inner_step(lambda w, lam, _: 2 * w.sum(), rule)
    >>> lam = torch.tensor(3.0)
    >>> step(step.init(torch.zeros(1), lam), lam, None).w  # -lr · λ · g
    tensor([-0.6000])
    """

    transform: Callable[[Tree, Tree, int], Tree] = lambda g, lam, t: g

    ranges: ClassVar[Mapping[str, Check]] = {"transform": partial(checks.function, signature="(g, lam, t) -> g")}

    @property
    @override
    def elementwise(self) -> bool:
        return False

    def incoming(self, g: Tree, w: Tree, lam: Tree, t: int) -> Tree:
        """The transformed gradient. A missing one is zero to the transform, and missing again after it."""
        flat_g, spec = tree.flatten(g)
        out = self.transform(tree.filled(g, w), lam, t)
        try:
            flat = tree.leaves_like(out, spec)
        except ValueError as error:
            raise ValueError(f"the gradient transform changed the structure of the gradient: {error}") from None
        shapes = [tuple(x.shape) for x in flat]
        wanted = [tuple(x.shape) for x in tree.leaves(w)]
        if shapes != wanted:
            raise ValueError(f"the gradient transform changed shapes: {shapes}, wanted are {wanted}")
        kept = [None if old is None else new for old, new in zip(flat_g, flat, strict=True)]
        return tree.unflatten(kept, spec)

    @property
    @override
    def reads_lam(self) -> bool:
        return True


def meta_curvature(optimizer: Optimizer, factors: Callable[[Tree], Tree]) -> Precondition:
    """Meta-Curvature: ``G ↦ M_o G M_i`` for matrices, ``g ↦ M_o g`` for vectors.

    Gradients of other ranks pass unchanged.

    Args:
        optimizer: gets the transformed gradient.
        factors: ``lam -> pytree like w`` with ``(M_o, M_i)``, ``(M_o,)`` or ``()`` at each leaf;
            see :func:`identity_factors`.
    """

    def transform(g: Tree, lam: Tree, t: int) -> Tree:
        return tree.map(_both_sides, g, factors(lam))

    return Precondition(optimizer, transform)


def identity_factors(w: Tree) -> Tree:
    """Where Meta-Curvature starts: ``(I, I)`` for each matrix, ``(I,)`` for each vector, ``()`` for anything else."""
    return tree.map(
        lambda x: tuple(torch.eye(n, dtype=x.dtype, device=x.device) for n in x.shape) if x.ndim in (1, 2) else (), w
    )


def _both_sides(g: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
    if len(factors) == 2:
        return factors[0] @ g @ factors[1]
    return factors[0] @ g if factors else g
