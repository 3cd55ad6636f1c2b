"""A two-layer transformer on sequences of 16; its input map is λ. Attention is written out.

Fused kernels have no second derivative.
"""

import torch
from torch import Tensor, nn

from benchmarks.problem import Problem


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.LayerNorm(width)
        self.second = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.first(x)).chunk(3, -1)
        x = x + self.out(torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v)
        return x + self.mlp(self.second(x))


def make(T: int, dtype: torch.dtype) -> Problem:
    net = nn.Sequential(nn.Linear(8, 32), Block(32), Block(32), nn.Flatten(), nn.Linear(16 * 32, 10)).to(dtype)
    data = [(torch.randn(20, 16, 8, dtype=dtype), torch.randint(10, (20,))) for _ in range(6)]
    return Problem(net, ["1.*", "2.*", "4.*"], 1, nn.functional.cross_entropy, [data[t % 5] for t in range(T)], data[5])
