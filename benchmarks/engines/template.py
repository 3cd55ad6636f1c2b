"""Copy this file: run ``len(problem.batches)`` steps of momentum SGD on the weights, return the exact dL_val/dλ."""

from torch import Tensor

from benchmarks.problem import Problem


def gradient(problem: Problem) -> list[Tensor] | None:
    return None
