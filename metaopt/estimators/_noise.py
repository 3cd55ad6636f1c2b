"""Random pytrees from an estimator's own generator.

The global generators are never touched, and a run can be replayed.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from metaopt import tree
from metaopt.tree import Tree

Law: TypeAlias = Literal["gaussian", "sign"]
"""``"gaussian"``: standard normal; ``"sign"``: ±1 with equal odds. Both have mean 0 and covariance I."""


def start(seed: int) -> Tensor:
    """The state of a fresh generator, to be carried."""
    return torch.Generator().manual_seed(seed).get_state()


def draw(like: Tree, law: Law, generator: Tensor, *, copies: int | None = None) -> tuple[Tree, Tensor]:
    """Independent noise in the shape of ``like``, and the generator's next state.

    With ``copies`` a leaf has the shape ``[copies, *leaf.shape]``. Numbers are drawn on the CPU, so
    that they are the same on every device. Leaves that are not real numbers stay as they are.
    """
    source = torch.Generator()
    source.set_state(generator)

    def leaf_noise(leaf: Tensor) -> Tensor:
        if not tree.is_float(leaf):
            return leaf
        shape = leaf.shape if copies is None else (copies, *leaf.shape)
        if law == "sign":
            noise = torch.randint(0, 2, shape, generator=source).to(leaf.dtype) * 2 - 1
        else:
            noise = torch.randn(shape, generator=source, dtype=leaf.dtype)
        return noise.to(leaf.device)

    return tree.map(leaf_noise, like), source.get_state()


def check_precision(moved: Tree, size: float, setting: str, what: str) -> None:
    """Refuse numbers that are too coarse for a step of this size.

    Raises:
        ValueError: if the rounding of a leaf is not far below the step.
    """
    for name, leaf in zip(tree.names(moved), tree.leaves(moved), strict=True):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and torch.finfo(leaf.dtype).eps > 0.01 * size:
            where = name or "the root"
            raise ValueError(
                f"{setting}={size:g} is a step that {leaf.dtype} hardly resolves, and the {what} at {where} "
                "are of that type: keep them in float32 (torch.autocast makes the rest fast), or take a larger step"
            )
