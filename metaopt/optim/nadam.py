"""NAdam: Adam with Nesterov momentum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from metaopt import checks
from metaopt.optim import safe
from metaopt.optim.moments import decayed, moments, zeros
from metaopt.optim.optimizer import Check, Hyper, Optimizer, Slots


@dataclass(frozen=True)
class NAdam(Optimizer):
    r"""NAdam, equal to ``torch.optim.NAdam`` step by step.

    Slots: ``first``, ``second``, ``product`` (of the μ so far).

    .. math::
        \mu_t = \beta_1 (1 - \tfrac12\, 0.96^{t \psi}), \quad
        w_t = w_{t-1} - \frac{\eta}{\sqrt{\hat v_t} + \epsilon}
          \left( \frac{(1-\mu_t)\, g}{1 - \prod_{i \le t} \mu_i}
          + \frac{\mu_{t+1}\, m_t}{1 - \prod_{i \le t+1} \mu_i} \right)

    Dozat 2016, "Incorporating Nesterov momentum into Adam".

    Args:
        lr: learning rate η.
        betas: ``(β1, β2)``.
        eps: ε.
        weight_decay: coefficient of weight decay.
        momentum_decay: ψ.
        decoupled_weight_decay: decay the weights, as AdamW does, instead of adding to the gradient.

    >>> import metaopt as mo, torch
    >>> rule = mo.optim.NAdam(lr=0.1, betas=(0.0, 0.999))
    >>> step = mo.inner_step(lambda w, lam, _: 2 * w.sum(), rule)
    >>> step(step.init(torch.zeros(1), None), None, None).w  # without momentum the first step is -lr · sign(g)
    tensor([-0.1000])
    """

    lr: Hyper = 2e-3
    betas: tuple[Hyper, Hyper] | Hyper = (0.9, 0.999)
    eps: Hyper = 1e-8
    weight_decay: Hyper = 0.0
    momentum_decay: Hyper = 4e-3
    decoupled_weight_decay: bool = False

    hypers: ClassVar[tuple[str, ...]] = ("lr", "betas", "eps", "weight_decay", "momentum_decay")
    ranges: ClassVar[Mapping[str, Check]] = {"momentum_decay": checks.non_negative}

    @property
    @override
    def counts_steps(self) -> bool:
        return True

    def init_leaf(self, w: Tensor) -> Slots:
        """Zeros, and ones for the product."""
        return {**zeros(w), "product": torch.ones_like(w)}

    @override
    def update_leaf(self, g: Tensor, w: Tensor, slots: Slots, hyper: dict[str, Any], t: int) -> tuple[Tensor, Slots]:
        beta1, beta2 = hyper["betas"]
        g, w = decayed(g, w, hyper, decoupled=self.decoupled_weight_decay)
        first, second = moments(g, slots, beta1, beta2)

        decay = hyper["momentum_decay"]
        mu = beta1 * (1 - 0.5 * 0.96 ** (t * decay))
        mu_next = beta1 * (1 - 0.5 * 0.96 ** ((t + 1) * decay))
        product = slots["product"] * mu
        of_gradient = (1 - mu) / (1 - product)
        of_moment = mu_next / (1 - product * mu_next)
        direction = of_gradient * g + of_moment * first

        scale = safe.with_eps(safe.sqrt(second / (1 - beta2**t)), hyper["eps"])
        new = {"first": first, "second": second, "product": product}
        return w - hyper["lr"] * direction / scale, new
