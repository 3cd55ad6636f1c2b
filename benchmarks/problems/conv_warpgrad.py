"""WarpGrad's net: three conv layers of 32 (weights), each followed by two warp layers (λ)."""

import torch
from torch import nn

from benchmarks.problem import Problem, images


def make(T: int, dtype: torch.dtype) -> Problem:
    def block(channels):
        warp = [nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)]
        return [nn.Conv2d(channels, 32, 3, padding=1), nn.BatchNorm2d(32, track_running_stats=False), nn.ReLU(), nn.MaxPool2d(2), *warp]

    net = nn.Sequential(*block(3), *block(32), *block(32), nn.Flatten(), nn.Linear(512, 10))
    return images(net, ["0.*", "1.*", "7.*", "8.*", "14.*", "15.*", "22.*"], None, T, dtype)
