"""ANIL's net: four conv layers of 32; the lower three are λ, the fourth and the classifier are weights."""

import torch
from torch import nn

from benchmarks.problem import Problem, images


def make(T: int, dtype: torch.dtype) -> Problem:
    def block(channels):
        return [
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.BatchNorm2d(32, track_running_stats=False),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]

    net = nn.Sequential(*block(3), *block(32), *block(32), *block(32), nn.Flatten(), nn.Linear(128, 10))
    return images(net, ["12.*", "13.*", "17.*"], 12, T, dtype)
