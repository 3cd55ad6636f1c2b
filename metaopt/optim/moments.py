"""What Adam's family shares: running moments of the gradient, and the two kinds of weight decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metaopt.optim.optimizer import Slots, is_zero


def zeros(w: Tensor) -> Slots:
    """Both moments before the first step."""
    return {"first": torch.zeros_like(w), "second": torch.zeros_like(w)}


def moments(g: Tensor, slots: Slots, beta1: float | Tensor, beta2: float | Tensor) -> tuple[Tensor, Tensor]:
    r""":math:`m \leftarrow \beta_1 m + (1 - \beta_1) g,\; v \leftarrow \beta_2 v + (1 - \beta_2) g^2`."""
    first = slots["first"] + (1 - beta1) * (g - slots["first"])
    return first, beta2 * slots["second"] + (1 - beta2) * g * g


def decayed(g: Tensor, w: Tensor, hyper: dict[str, Any], *, decoupled: bool) -> tuple[Tensor, Tensor]:
    """``(g, w)`` after weight decay: added to the gradient (L2), or taken off the weights (decoupled, as in AdamW)."""
    decay = hyper["weight_decay"]
    if is_zero(decay):
        return g, w
    return (g, w * (1 - hyper["lr"] * decay)) if decoupled else (g + decay * w, w)
