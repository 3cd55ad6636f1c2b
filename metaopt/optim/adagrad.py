"""Adagrad: rates divided by the root of all squared gradients so far."""

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
class Adagrad(Optimizer):
    r"""Adagrad, equal to ``torch.optim.Adagrad`` step by step. Slot: ``sum``.

    .. math::
        G_t = G_{t-1} + g^2,\quad w_t = w_{t-1} - \frac{\eta}{1 + (t-1)\,\text{lr\_decay}}
        \frac{g}{\sqrt{G_t} + \epsilon}

    Duchi, Hazan and Singer 2011, JMLR 12.

    Args:
        lr: learning rate η.
        lr_decay: decay of the learning rate.
        weight_decay: L2 coefficient.
        initial_accumulator_value: first value of the sum (a number).
        eps: ε.

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 2 * w.sum(), mo.optim.Adagrad(lr=0.1))
    >>> step(step.init(torch.zeros(1), None), None, None).w  # the first step is -lr · sign(g)
    tensor([-0.1000])
    """

    lr: Hyper = 1e-2
    lr_decay: Hyper = 0.0
    weight_decay: Hyper = 0.0
    initial_accumulator_value: float = 0.0
    eps: Hyper = 1e-10

    hypers: ClassVar[tuple[str, ...]] = ("lr", "lr_decay", "weight_decay", "eps")
    ranges: ClassVar[Mapping[str, Check]] = {
        "lr_decay": checks.non_negative,
        "initial_accumulator_value": checks.non_negative,
    }

    @property
    @override
    def counts_steps(self) -> bool:
        return not is_zero(self.lr_decay)

    def init_leaf(self, w: Tensor) -> Slots:
        """The first value of the sum."""
        return {"sum": torch.full_like(w, self.initial_accumulator_value)}

    @override
    def update_leaf(self, g: Tensor, w: Tensor, slots: Slots, hyper: dict[str, Any], t: int) -> tuple[Tensor, Slots]:
        g, w = decayed(g, w, hyper, decoupled=False)
        total = slots["sum"] + g * g
        scale = safe.with_eps(safe.sqrt(total), hyper["eps"])
        rate = hyper["lr"] / (1 + (t - 1) * hyper["lr_decay"])
        return w - rate * g / scale, {"sum": total}
