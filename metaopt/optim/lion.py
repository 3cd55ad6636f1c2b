"""Lion: the sign of an interpolated momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from metaopt.optim.moments import decayed
from metaopt.optim.optimizer import Hyper, Optimizer, Slots


@dataclass(frozen=True)
class Lion(Optimizer):
    r"""Lion. Slot: ``first``.

    .. math::
        w_t = (1 - \eta\,\text{wd})\, w_{t-1} - \eta\, \text{sign}(\beta_1 m_{t-1} + (1-\beta_1)
        g),\quad m_t = \beta_2 m_{t-1} + (1-\beta_2) g

    Chen et al. 2023, `arXiv 2302.06675 <https://arxiv.org/abs/2302.06675>`__.

    **Derivative**: that of the function as it is; the sign is constant almost everywhere. So
    hyperparameters inside the inner loss (and the betas) have hypergradient 0, and only ``lr`` and
    ``weight_decay`` have a response.

    Args:
        lr: learning rate η.
        betas: ``(β1, β2)``.
        weight_decay: decoupled weight decay.

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 2 * w.sum(), mo.optim.Lion(lr=0.1))
    >>> step(step.init(torch.zeros(1), None), None, None).w  # -lr · sign(g)
    tensor([-0.1000])
    """

    lr: Hyper = 1e-4
    betas: tuple[Hyper, Hyper] | Hyper = (0.9, 0.99)
    weight_decay: Hyper = 0.0

    decoupled: ClassVar[bool] = True
    hypers: ClassVar[tuple[str, ...]] = ("lr", "betas", "weight_decay")

    @override
    def init_leaf(self, w: Tensor) -> Slots:
        return {"first": torch.zeros_like(w)}

    @override
    def update_leaf(self, g: Tensor, w: Tensor, slots: Slots, hyper: dict[str, Any], t: int) -> tuple[Tensor, Slots]:
        beta1, beta2 = hyper["betas"]
        g, w = decayed(g, w, hyper, decoupled=True)
        first = slots["first"]
        direction = (beta1 * first + (1 - beta1) * g).sign()
        return w - hyper["lr"] * direction, {"first": beta2 * first + (1 - beta2) * g}
