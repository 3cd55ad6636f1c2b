"""RMSprop: gradients divided by the root of a running second moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from metaopt import checks
from metaopt.optim import safe
from metaopt.optim.moments import decayed
from metaopt.optim.optimizer import Check, Hyper, Optimizer, Slots, is_zero


@dataclass(frozen=True)
class RMSprop(Optimizer):
    r"""RMSprop, equal to ``torch.optim.RMSprop`` step by step.

    Slots: ``second``, ``mean`` (centred), ``momentum``.

    .. math::
        v_t = \alpha v_{t-1} + (1-\alpha) g^2,\quad d_t = \frac{g}{\sqrt{v_t - \bar g_t^2 \text{ if
        centered}} + \epsilon},\quad b_t = \mu b_{t-1} + d_t,\quad w_t = w_{t-1} - \eta\, b_t

    Tieleman and Hinton 2012, lecture 6e; centred: Graves 2013, `arXiv 1308.0850
    <https://arxiv.org/abs/1308.0850>`__.

    Args:
        lr: learning rate η.
        alpha: decay of the second moment.
        eps: ε.
        weight_decay: L2 coefficient.
        momentum: μ; the float 0 keeps no slot.
        centered: divide by the standard deviation instead.

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 2 * w.sum(), mo.optim.RMSprop(lr=0.1, alpha=0.99))
    >>> step(step.init(torch.zeros(1), None), None, None).w  # the first step is -lr / √(1 - α) · sign(g)
    tensor([-1.0000])
    """

    lr: Hyper = 1e-2
    alpha: Hyper = 0.99
    eps: Hyper = 1e-8
    weight_decay: Hyper = 0.0
    momentum: Hyper = 0.0
    centered: bool = False

    hypers: ClassVar[tuple[str, ...]] = ("lr", "alpha", "eps", "weight_decay", "momentum")
    ranges: ClassVar[Mapping[str, Check]] = {"alpha": checks.unit_interval, "centered": checks.flag}

    @override
    def init_leaf(self, w: Tensor) -> Slots:
        slots = {"second": torch.zeros_like(w)}
        if self.centered:
            slots["mean"] = torch.zeros_like(w)
        if not is_zero(self.momentum):
            slots["momentum"] = torch.zeros_like(w)
        return slots

    @override
    def update_leaf(self, g: Tensor, w: Tensor, slots: Slots, hyper: dict[str, Any], t: int) -> tuple[Tensor, Slots]:
        alpha = hyper["alpha"]
        g, w = decayed(g, w, hyper, decoupled=False)
        new = {"second": alpha * slots["second"] + (1 - alpha) * g * g}
        variance = new["second"]
        if self.centered:
            mean = new["mean"] = slots["mean"] + (1 - alpha) * (g - slots["mean"])
            variance = variance - mean * mean
        direction = g / safe.with_eps(safe.sqrt(variance), hyper["eps"])
        if "momentum" in slots:
            direction = new["momentum"] = hyper["momentum"] * slots["momentum"] + direction
        return w - hyper["lr"] * direction, new
