"""Adamax: Adam with the largest absolute gradient in place of the second moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from metaopt.optim import safe
from metaopt.optim.moments import decayed
from metaopt.optim.optimizer import Hyper, Optimizer, Slots


@dataclass(frozen=True)
class Adamax(Optimizer):
    r"""Adamax, equal to ``torch.optim.Adamax`` step by step. Slots: ``first``, ``largest``.

    .. math::
        m_t = \beta_1 m_{t-1} + (1-\beta_1) g,\quad u_t = \max(\beta_2 u_{t-1},\, |g| +
        \epsilon),\quad w_t = w_{t-1} - \frac{\eta}{1-\beta_1^t} \frac{m_t}{u_t}

    Kingma and Ba 2015, `arXiv 1412.6980 <https://arxiv.org/abs/1412.6980>`__, section 7.1.

    Args:
        lr: learning rate η.
        betas: ``(β1, β2)``.
        eps: ε.
        weight_decay: L2 coefficient.

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 2 * w.sum(), mo.optim.Adamax(lr=0.1))
    >>> step(step.init(torch.zeros(1), None), None, None).w  # the first step is -lr · sign(g)
    tensor([-0.1000])
    """

    lr: Hyper = 2e-3
    betas: tuple[Hyper, Hyper] | Hyper = (0.9, 0.999)
    eps: Hyper = 1e-8
    weight_decay: Hyper = 0.0

    hypers: ClassVar[tuple[str, ...]] = ("lr", "betas", "eps", "weight_decay")

    @property
    @override
    def counts_steps(self) -> bool:
        return True

    @override
    def init_leaf(self, w: Tensor) -> Slots:
        return {"first": torch.zeros_like(w), "largest": torch.zeros_like(w)}

    @override
    def update_leaf(self, g: Tensor, w: Tensor, slots: Slots, hyper: dict[str, Any], t: int) -> tuple[Tensor, Slots]:
        beta1, beta2 = hyper["betas"]
        g, w = decayed(g, w, hyper, decoupled=False)
        first = slots["first"] + (1 - beta1) * (g - slots["first"])
        size = safe.with_eps(g.abs(), hyper["eps"])
        largest = torch.maximum(beta2 * slots["largest"], size)
        rate = hyper["lr"] / (1 - beta1**t)
        return w - rate * first / largest, {"first": first, "largest": largest}
