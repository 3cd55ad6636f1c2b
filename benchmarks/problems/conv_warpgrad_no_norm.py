"""WarpGrad's net without its batch norms, whose double backward takes much of the memory."""

import torch

from benchmarks.problem import Problem
from benchmarks.problems import conv_warpgrad


def make(T: int, dtype: torch.dtype) -> Problem:
    return conv_warpgrad.make(T, dtype, norm=False)
