"""Linear layers under :func:`torch.vmap`, as in a stacked meta-batch of tiny nets."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metaopt.layers.eager import transformed


class LeanLinear(nn.Linear):
    """What a linear layer becomes inside :func:`metaopt.functional`: the same numbers.

    Under vmap torch makes of its one call a product of matrices, a sum, and a multiplication by one
    of either, each with derivatives.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``x Wᵀ + b``: torch's own call, or under a transform of ``torch.func`` the product and the sum alone."""
        if torch.compiler.is_compiling() or not transformed():
            return nn.functional.linear(input, self.weight, self.bias)
        product = input @ self.weight.mT
        return (
            product if self.bias is None else product + self.bias.to(product.dtype)
        )  # autocast casts products, not sums
