"""Gradient clipping inside the step, and so inside its derivative."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from metaopt import checks, tree
from metaopt.optim import safe
from metaopt.optim.optimizer import Check, Hyper
from metaopt.optim.wrapper import Wrapper, present, value
from metaopt.tree import Tree


@dataclass(frozen=True)
class ClipValue(Wrapper):
    r"""Every entry of the gradient clamped to a range, as ``torch.nn.utils.clip_grad_value_`` does.

    .. math:: g \leftarrow \max(-c,\, \min(c,\, g))

    The derivative is 0 where an entry is clamped.

    Args:
        optimizer: gets the clamped gradient.
        limit: c, one number (or a callable that gives one).

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 2 * w.sum(), mo.optim.ClipValue(mo.optim.SGD(lr=0.1), limit=1.0))
    >>> step(step.init(torch.zeros(1), None), None, None).w  # -lr · limit, since g = 2
    tensor([-0.1000])
    """

    limit: Hyper = 1.0

    hypers: ClassVar[tuple[str, ...]] = ("limit",)
    ranges: ClassVar[Mapping[str, Check]] = {"limit": checks.positive}

    @override
    def incoming(self, g: Tree, w: Tree, lam: Tree, t: int) -> Tree:
        limit = value(self.limit, lam, t)

        def clamped(x: Tensor) -> Tensor:
            bound = safe.like(limit, x)
            return torch.maximum(torch.minimum(x, bound), -bound)

        return present(clamped, g)


@dataclass(frozen=True)
class ClipNorm(Wrapper):
    r"""The gradient scaled down to a global norm, as ``torch.nn.utils.clip_grad_norm_`` does.

    .. math:: g \leftarrow g\, \min\left(1,\; \frac{c}{\|g\| + 10^{-6}}\right)

    It couples all weights: in a stacked meta-batch wrap it in :class:`metaopt.optim.PerTask`.

    Args:
        optimizer: gets the clipped gradient.
        max_norm: c, one number (or a callable that gives one).

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 2 * w.sum(), mo.optim.ClipNorm(mo.optim.SGD(lr=0.1), max_norm=1.0))
    >>> step(step.init(torch.zeros(1), None), None, None).w  # -lr · g / |g|
    tensor([-0.1000])
    """

    max_norm: Hyper = 1.0

    hypers: ClassVar[tuple[str, ...]] = ("max_norm",)
    ranges: ClassVar[Mapping[str, Check]] = {"max_norm": checks.positive}

    @property
    @override
    def elementwise(self) -> bool:
        return False

    @override
    def incoming(self, g: Tree, w: Tree, lam: Tree, t: int) -> Tree:
        norm = safe.sqrt(tree.dot(g, g))
        factor = torch.clamp(value(self.max_norm, lam, t) / (norm + 1e-6), max=1.0)
        return present(lambda x: factor.to(x.dtype) * x, g)
