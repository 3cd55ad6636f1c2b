"""Linear layers under :func:`torch.vmap`, as in a stacked meta-batch of tiny nets."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metaopt.layers.eager import transformed


def forward(layer: nn.Linear, input: Tensor) -> Tensor:
    """``x Wᵀ + b``, the same numbers as torch's.

    Under vmap torch makes of its one call a product of matrices, a sum, and a multiplication by one
    of either, each with derivatives. Here it is the product and the sum alone.
    """
    if torch.compiler.is_compiling() or not transformed():
        return nn.functional.linear(input, layer.weight, layer.bias)
    product = input @ layer.weight.mT
    if layer.bias is None:
        return product
    return product + layer.bias.to(product.dtype)  # autocast casts products, not sums
