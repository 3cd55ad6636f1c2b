r"""Label corruption: with probability ``rate`` a label y is drawn from other classes.

``uniform``: any class, y included; ``flip``: one other class, fixed for each y; ``flip2``: one of
two others, fixed for each y. Shu et al. 2019 (Meta-Weight-Net), `arXiv 1902.07379
<https://arxiv.org/abs/1902.07379>`__.
"""

from __future__ import annotations

import torch
from torch import Tensor


def uniform(labels: Tensor, classes: int, rate: float, seed: int) -> Tensor:
    """Labels replaced by a uniformly random class, so ``rate · (classes - 1) / classes`` of them become wrong."""
    return _corrupt(labels, classes, rate, seed, others=0)


def flip(labels: Tensor, classes: int, rate: float, seed: int) -> Tensor:
    """Labels replaced by the one class that their class is confused with."""
    return _corrupt(labels, classes, rate, seed, others=1)


def flip2(labels: Tensor, classes: int, rate: float, seed: int) -> Tensor:
    """Labels replaced by one of the two classes that their class is confused with, each with probability ``rate / 2``.

    >>> flip2(torch.tensor([0, 1, 2]), classes=3, rate=0.0, seed=0).tolist()
    [0, 1, 2]
    """
    return _corrupt(labels, classes, rate, seed, others=2)


def _corrupt(labels: Tensor, classes: int, rate: float, seed: int, *, others: int) -> Tensor:
    """Labels replaced by one of ``others`` classes that their class is confused with; 0: by any class.

    The global random state is not used.
    """
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels are class numbers (integers), got a tensor of {labels.dtype}")
    if not 0 <= rate <= 1:
        raise ValueError(f"rate is a probability, got {rate}")
    if classes < max(2, others + 1):
        raise ValueError(f"{classes} classes are too few to draw {max(1, others)} other(s) from")
    if labels.numel():
        lowest = int(labels.min())
        highest = int(labels.max())
        if lowest < 0 or highest >= classes:
            raise ValueError(f"labels must lie in 0 … {classes - 1}, got {lowest} … {highest}")

    generator = torch.Generator().manual_seed(seed)
    clean = labels.detach().cpu().long()
    orders = [torch.randperm(classes - 1, generator=generator) for _ in range(classes)]
    shifts = torch.stack(orders) + 1
    hit = torch.rand(clean.shape, generator=generator) < rate
    if others == 0:
        drawn = torch.randint(classes, clean.shape, generator=generator)
    else:
        other = torch.randint(others, clean.shape, generator=generator)
        shifted = clean + shifts[clean, other]
        drawn = shifted % classes
    return torch.where(hit, drawn, clean).to(labels)
