"""The convolutional networks of the few-shot literature.

Blocks of conv 3×3, normalisation, ReLU, max-pooling, and a linear classifier.

Vinyals et al. 2016, `arXiv 1606.04080 <https://arxiv.org/abs/1606.04080>`__; with 3 or 4 blocks of
32 channels the backbones of the HyperDistill paper's image experiments.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TypeAlias

from torch import nn

Norm: TypeAlias = Callable[[int], nn.Module]
"""``channels -> layer``: :func:`batch_norm`, :func:`group_norm`, :func:`no_norm` or your own."""


def batch_norm(channels: int) -> nn.Module:
    """Batch normalisation by the statistics of the batch at hand, also at test time ("transductive").

    There are no running statistics: under a stacked meta-batch they could not be written to, and
    they would mix tasks.
    """
    return nn.BatchNorm2d(channels, track_running_stats=False)


def group_norm(channels: int) -> nn.Module:
    """Group normalisation in (at most) 8 groups: each example for itself.

    Wu & He 2018, `arXiv 1803.08494 <https://arxiv.org/abs/1803.08494>`__.
    """
    groups = next(g for g in range(min(8, channels), 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels)


def no_norm(channels: int) -> nn.Module:
    """In the place of a normalisation layer: none."""
    return nn.Identity()


def conv_net(
    blocks: int, channels: int, classes: int, in_channels: int, image_size: int, *, norm: Norm = batch_norm
) -> nn.Sequential:
    """``blocks`` blocks and a linear classifier.

    Every block halves the image (rounding down) until it is one pixel, from where blocks have no
    pooling: 14×14 goes 7, 3, 1, 1.

    Args:
        blocks: number of blocks, ≥ 1.
        channels: of every conv layer.
        classes: outputs of the classifier.
        in_channels: of the images.
        image_size: height and width of the images, in pixels.
        norm: the normalisation.

    Returns:
        A sequential module with the children ``block1`` … ``blockN``, ``flatten``, ``head``; a
        block has ``conv``, ``norm``, ``relu``, ``pool``.

    Raises:
        ValueError: if a number is not positive.

    >>> net = conv_net(4, 8, classes=10, in_channels=1, image_size=14)
    >>> sorted({name.split(".")[0] for name, _ in net.named_parameters()}), net.head.in_features
    (['block1', 'block2', 'block3', 'block4', 'head'], 8)
    """
    for what, number in {
        "blocks": blocks,
        "channels": channels,
        "classes": classes,
        "in_channels": in_channels,
        "image_size": image_size,
    }.items():
        if number < 1:
            raise ValueError(f"conv_net needs {what} >= 1, got {number}")
    children: OrderedDict[str, nn.Module] = OrderedDict()
    size = image_size
    for index in range(1, blocks + 1):
        children[f"block{index}"] = _block(in_channels, channels, norm, pool=size > 1)
        in_channels = channels
        size = max(size // 2, 1)
    children["flatten"] = nn.Flatten()
    children["head"] = nn.Linear(channels * size * size, classes)
    return nn.Sequential(children)


def _block(in_channels: int, channels: int, norm: Norm, *, pool: bool) -> nn.Sequential:
    layers = OrderedDict[str, nn.Module](
        conv=nn.Conv2d(in_channels, channels, 3, padding=1), norm=norm(channels), relu=nn.ReLU()
    )
    if pool:
        layers["pool"] = nn.MaxPool2d(2)
    return nn.Sequential(layers)
