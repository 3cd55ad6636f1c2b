"""WarpGrad's net: three conv layers of 32 (weights), each followed by two warp layers (λ)."""

import torch
from torch import nn

from benchmarks.problem import Problem, images


def make(T: int, dtype: torch.dtype, norm: bool = True) -> Problem:
    def block(channels):
        warp = [nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)]
        between = nn.BatchNorm2d(32, track_running_stats=False) if norm else nn.Identity()
        return [nn.Conv2d(channels, 32, 3, padding=1), between, nn.ReLU(), nn.MaxPool2d(2), *warp]

    net = nn.Sequential(*block(3), *block(32), *block(32), nn.Flatten(), nn.Linear(512, 10))
    norms = ["1.*", "8.*", "15.*"] if norm else []
    return images(net, ["0.*", "7.*", "14.*", "22.*", *norms], None, T, dtype)
