"""What a problem is: a module, which of its parameters are the weights, data."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Problem(NamedTuple):
    """λ is every parameter that is no weight; inner and outer loss are the same criterion on different batches."""

    module: nn.Sequential
    weights: list[str]
    tail: int | None  # the weights are those of module[tail:], if they are at the end
    criterion: Callable[[Tensor, Tensor], Tensor]
    batches: list[Any]
    outer_batch: Any
    lr: float = 0.01
    momentum: float = 0.9


def few(problem: Problem) -> Problem:
    """Two steps on four examples, to warm up on."""
    small = tuple(part[:4].clone() for part in problem.outer_batch)
    return problem._replace(batches=[small] * 2, outer_batch=small)


def images(module: nn.Sequential, weights: list[str], tail: int | None, T: int, dtype: torch.dtype) -> Problem:
    """Ten classes, batches of a hundred 3x32x32 images of noise (five batches, used in turn)."""
    data = [(torch.randn(100, 3, 32, 32, dtype=dtype), torch.randint(10, (100,))) for _ in range(6)]
    batches = [data[t % 5] for t in range(T)]
    return Problem(module.to(dtype), weights, tail, nn.functional.cross_entropy, batches, data[5])
