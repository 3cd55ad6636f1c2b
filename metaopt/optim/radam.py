"""RAdam: Adam whose adaptive rate is rectified while the second moment is uncertain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from metaopt.optim import safe
from metaopt.optim.moments import decayed, moments, zeros
from metaopt.optim.optimizer import Hyper, Optimizer, Slots


@dataclass(frozen=True)
class RAdam(Optimizer):
    r"""RAdam, equal to ``torch.optim.RAdam`` step by step. Slots: ``first``, ``second``.

    .. math::
        \rho_t = \rho_\infty - \frac{2 t \beta_2^t}{1-\beta_2^t}, \quad \rho_\infty = \frac{2}{1-\beta_2} - 1, \quad
        r_t = \sqrt{\frac{(\rho_t-4)(\rho_t-2)\rho_\infty}{(\rho_\infty-4)(\rho_\infty-2)\rho_t}}

    With :math:`\rho_t > 5` the step is Adam's times :math:`r_t`; before, plain momentum. Liu et al.
    2020, `arXiv 1908.03265 <https://arxiv.org/abs/1908.03265>`__.

    The switch at :math:`\rho_t = 5` depends on t and β2 only; its derivative with respect to β2 is
    that of the branch taken.

    Args:
        lr: learning rate η.
        betas: ``(β1, β2)``; β2 is one number for all weights.
        eps: ε.
        weight_decay: coefficient of weight decay.
        decoupled_weight_decay: decay the weights, as AdamW does, instead of adding to the gradient.

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 2 * w.sum(), mo.optim.RAdam(lr=0.1))
    >>> step(step.init(torch.zeros(1), None), None, None).w  # the first steps are those of momentum: -lr · g
    tensor([-0.2000])
    """

    lr: Hyper = 1e-3
    betas: tuple[Hyper, Hyper] | Hyper = (0.9, 0.999)
    eps: Hyper = 1e-8
    weight_decay: Hyper = 0.0
    decoupled_weight_decay: bool = False

    hypers: ClassVar[tuple[str, ...]] = ("lr", "betas", "eps", "weight_decay")

    @property
    @override
    def counts_steps(self) -> bool:
        return True

    @override
    def init_leaf(self, w: Tensor) -> Slots:
        return zeros(w)

    @override
    def update_leaf(self, g: Tensor, w: Tensor, slots: Slots, hyper: dict[str, Any], t: int) -> tuple[Tensor, Slots]:
        beta1, beta2 = hyper["betas"]
        g, w = decayed(g, w, hyper, decoupled=self.decoupled_weight_decay)
        first, second = moments(g, slots, beta1, beta2)
        step = hyper["lr"] * first / (1 - beta1**t)
        bias = 1 - beta2**t
        limit = 2 / (1 - beta2) - 1
        rho = limit - 2 * t * beta2**t / bias
        settled = rho.detach() if isinstance(rho, Tensor) else rho
        if settled > 5:
            now = (rho - 4) * (rho - 2) * limit
            in_the_limit = (limit - 4) * (limit - 2) * rho
            rectified = (now / in_the_limit) ** 0.5
            scale = safe.with_eps(safe.sqrt(second), hyper["eps"])
            step = step * rectified * bias**0.5 / scale
        return w - step, {"first": first, "second": second}
