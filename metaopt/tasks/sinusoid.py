r"""Sinusoidal regression: each task is one curve :math:`y = A \sin(x - \varphi)` and a few points on it.

:math:`A \sim U(0.1, 5)`, :math:`\varphi \sim U(0, \pi)`, :math:`x \sim U(-5, 5)`. Finn et al. 2017,
`arXiv 1703.03400 <https://arxiv.org/abs/1703.03400>`__; appendix G of the HyperDistill paper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class SinusoidBatch(NamedTuple):
    """Points of stacked tasks: ``x`` and ``y`` of shape ``[tasks, points, 1]``."""

    x: Tensor
    y: Tensor


class SinusoidTasks(NamedTuple):
    """Training and test points of stacked tasks."""

    train: SinusoidBatch
    test: SinusoidBatch


@dataclass(frozen=True)
class Sinusoid:
    """The task distribution.

    Args:
        shots: training points of a task.
        test_points: test points of a task.

    >>> tasks = Sinusoid(shots=10).sample(4, seed=0)
    >>> tasks.train.x.shape, tasks.test.y.shape
    (torch.Size([4, 10, 1]), torch.Size([4, 10, 1]))
    """

    shots: int = 10
    test_points: int = 10

    def __post_init__(self) -> None:
        """Refuses a task without training or test points."""
        if self.shots < 1 or self.test_points < 1:
            raise ValueError(
                f"a task needs training and test points, got shots={self.shots}, test_points={self.test_points}"
            )

    def sample(self, tasks: int, seed: int) -> SinusoidTasks:
        """``tasks`` stacked tasks; the same seed gives the same tasks, and the global random state is not used."""
        if tasks < 1:
            raise ValueError(f"at least one task is needed, got {tasks}")
        points = self.shots + self.test_points
        generator = torch.Generator().manual_seed(seed)
        amplitude = 0.1 + 4.9 * torch.rand(tasks, 1, 1, generator=generator)
        phase = math.pi * torch.rand(tasks, 1, 1, generator=generator)
        x = 10.0 * torch.rand(tasks, points, 1, generator=generator) - 5.0
        y = amplitude * torch.sin(x - phase)

        train = SinusoidBatch(x[:, : self.shots], y[:, : self.shots])
        test = SinusoidBatch(x[:, self.shots :], y[:, self.shots :])
        return SinusoidTasks(train, test)
