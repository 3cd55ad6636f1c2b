"""Averaged SGD: a decaying rate, and an average of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from metaopt import checks
from metaopt.optim.moments import decayed
from metaopt.optim.optimizer import Check, Hyper, Optimizer, Slots


@dataclass(frozen=True)
class ASGD(Optimizer):
    r"""Averaged SGD, equal to ``torch.optim.ASGD`` step by step.

    Slot: ``average`` (a, the averaged weights).

    .. math::
        \eta_t = \frac{\eta}{(1 + \lambda\eta\,(t-1))^{\alpha}},\quad
        w_t = (1 - \lambda\eta_t)\, w_{t-1} - \eta_t\, g,\quad
        a_t = a_{t-1} + \frac{w_t - a_{t-1}}{\max(1,\, t - 1 - t_0)}

    Polyak and Juditsky 1992, SIAM J. Control Optim. 30.

    Args:
        lr: learning rate η.
        lambd: decay λ.
        alpha: power α of the learning rate's decay.
        t0: step at which averaging starts (a number).
        weight_decay: L2 coefficient.

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 2 * w.sum(), mo.optim.ASGD(lr=0.1))
    >>> step(step.init(torch.zeros(1), None), None, None).w  # the first step is -lr · g
    tensor([-0.2000])
    """

    lr: Hyper = 1e-2
    lambd: Hyper = 1e-4
    alpha: Hyper = 0.75
    t0: float = 1e6
    weight_decay: Hyper = 0.0

    hypers: ClassVar[tuple[str, ...]] = ("lr", "lambd", "alpha", "weight_decay")
    ranges: ClassVar[Mapping[str, Check]] = {
        "lambd": checks.non_negative,
        "alpha": checks.non_negative,
        "t0": checks.non_negative,
    }

    @property
    @override
    def counts_steps(self) -> bool:
        return True

    @override
    def init_leaf(self, w: Tensor) -> Slots:
        return {"average": torch.zeros_like(w)}

    @override
    def update_leaf(self, g: Tensor, w: Tensor, slots: Slots, hyper: dict[str, Any], t: int) -> tuple[Tensor, Slots]:
        lr = hyper["lr"]
        lambd = hyper["lambd"]
        average = slots["average"]
        g, w = decayed(g, w, hyper, decoupled=False)

        rate = lr / (1 + lambd * lr * (t - 1)) ** hyper["alpha"]
        w = w * (1 - lambd * rate) - rate * g
        averaged = max(1.0, t - 1 - self.t0)
        return w, {"average": average + (w - average) / averaged}
