"""The sinusoid net, ANIL split, 10-shot."""

import torch
from torch import nn

from benchmarks.problem import Problem


def make(T: int, dtype: torch.dtype) -> Problem:
    net = nn.Sequential(
        nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 1)
    ).to(dtype)
    data = [(x := 10 * torch.rand(10, 1, dtype=dtype) - 5, x.sin()) for _ in range(2)]
    return Problem(net, ["6.*"], 6, nn.functional.mse_loss, [data[0]] * T, data[1])
