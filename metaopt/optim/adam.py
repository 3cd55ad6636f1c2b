"""Adam: running first and second moments of the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from metaopt.optim import safe
from metaopt.optim.moments import decayed, moments, zeros
from metaopt.optim.optimizer import Hyper, Optimizer, Slots


@dataclass(frozen=True)
class Adam(Optimizer):
    r"""Adam, equal to ``torch.optim.Adam`` step by step.

    Slots: ``first``, ``second`` (and ``largest`` with AMSGrad).

    .. math::
        m_t = \beta_1 m_{t-1} + (1-\beta_1) g,\quad v_t = \beta_2 v_{t-1} + (1-\beta_2) g^2,\quad
        w_t = w_{t-1} - \eta \frac{m_t / (1-\beta_1^t)}{\sqrt{v_t / (1-\beta_2^t)} + \epsilon}

    Kingma and Ba 2015, `arXiv 1412.6980 <https://arxiv.org/abs/1412.6980>`__; AMSGrad: Reddi et al.
    2018, `arXiv 1904.09237 <https://arxiv.org/abs/1904.09237>`__.

    Derivatives are finite at ``g = 0, v = 0``; there ``dw/dg = -η/ε`` (see
    :func:`metaopt.optim.safe.sqrt`), which is large because the update itself is that steep.

    Args:
        lr: learning rate η.
        betas: ``(β1, β2)``.
        eps: ε.
        weight_decay: L2 coefficient, added to the gradient.
        amsgrad: use the largest second moment so far.

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 2 * w.sum(), mo.optim.Adam(lr=0.1))
    >>> step(step.init(torch.zeros(1), None), None, None).w  # the first step is -lr · sign(g)
    tensor([-0.1000])
    """

    lr: Hyper = 1e-3
    betas: tuple[Hyper, Hyper] | Hyper = (0.9, 0.999)
    eps: Hyper = 1e-8
    weight_decay: Hyper = 0.0
    amsgrad: bool = False

    hypers: ClassVar[tuple[str, ...]] = ("lr", "betas", "eps", "weight_decay")

    @property
    @override
    def counts_steps(self) -> bool:
        return True

    @override
    def init_leaf(self, w: Tensor) -> Slots:
        slots = zeros(w)
        if self.amsgrad:
            slots["largest"] = torch.zeros_like(w)
        return slots

    @override
    def update_leaf(self, g: Tensor, w: Tensor, slots: Slots, hyper: dict[str, Any], t: int) -> tuple[Tensor, Slots]:
        beta1, beta2 = hyper["betas"]
        g, w = decayed(g, w, hyper, decoupled=self.decoupled)
        first, second = moments(g, slots, beta1, beta2)
        new = {"first": first, "second": second}
        if self.amsgrad:
            second = new["largest"] = torch.maximum(slots["largest"], second)
        deviation = safe.sqrt(second) / (1 - beta2**t) ** 0.5
        scale = safe.with_eps(deviation, hyper["eps"])
        rate = hyper["lr"] / (1 - beta1**t)
        return w - rate * first / scale, new
