"""Adadelta: steps scaled by a running size of earlier steps."""

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
from metaopt.optim.optimizer import Check, Hyper, Optimizer, Slots


@dataclass(frozen=True)
class Adadelta(Optimizer):
    r"""Adadelta, equal to ``torch.optim.Adadelta`` step by step. Slots: ``second``, ``delta``.

    .. math::
        v_t = \rho v_{t-1} + (1-\rho) g^2,\quad \delta = \frac{\sqrt{u_{t-1} + \epsilon}}{\sqrt{v_t
        + \epsilon}}\, g,\quad u_t = \rho u_{t-1} + (1-\rho) \delta^2,\quad w_t = w_{t-1} - \eta\,
        \delta

    Zeiler 2012, `arXiv 1212.5701 <https://arxiv.org/abs/1212.5701>`__.

    Args:
        lr: learning rate η.
        rho: decay ρ.
        eps: ε.
        weight_decay: L2 coefficient.

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 2 * w.sum(), mo.optim.Adadelta())
    >>> step(step.init(torch.zeros(1), None), None, None).w  # -√ε / √((1 - ρ) g² + ε) · g
    tensor([-0.0032])
    """

    lr: Hyper = 1.0
    rho: Hyper = 0.9
    eps: Hyper = 1e-6
    weight_decay: Hyper = 0.0

    hypers: ClassVar[tuple[str, ...]] = ("lr", "rho", "eps", "weight_decay")
    ranges: ClassVar[Mapping[str, Check]] = {"rho": checks.unit_interval}

    @override
    def init_leaf(self, w: Tensor) -> Slots:
        return {"second": torch.zeros_like(w), "delta": torch.zeros_like(w)}

    @override
    def update_leaf(self, g: Tensor, w: Tensor, slots: Slots, hyper: dict[str, Any], t: int) -> tuple[Tensor, Slots]:
        rho = hyper["rho"]
        eps = hyper["eps"]
        g, w = decayed(g, w, hyper, decoupled=False)
        before = slots["delta"]

        second = rho * slots["second"] + (1 - rho) * g * g
        ratio = safe.sqrt(before + eps) / safe.sqrt(second + eps)
        delta = ratio * g
        size = rho * before + (1 - rho) * delta * delta
        return w - hyper["lr"] * delta, {"second": second, "delta": size}
