"""Rprop: only the gradient's signs are used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from metaopt import checks
from metaopt.optim import safe
from metaopt.optim.optimizer import Check, Hyper, Optimizer, Slots


@dataclass(frozen=True)
class Rprop(Optimizer):
    r"""Rprop, equal to ``torch.optim.Rprop`` step by step. Slots: ``previous`` (gradient), ``size``.

    .. math::
        \Delta_t = \text{clip}(\Delta_{t-1} \cdot \{\eta^+, \eta^-, 1\}),\quad w_t = w_{t-1} - \text{sign}(g)\,\Delta_t

    where the factor depends on the sign of :math:`g_t g_{t-1}`, and g counts as 0 after a change of
    sign. Riedmiller and Braun 1993.

    **Derivative**: that of the function as it is, which is constant in the gradient almost
    everywhere. So hyperparameters inside the inner loss have hypergradient 0 here, and only ``lr``
    (the first step size), ``etas`` and ``step_sizes`` have a response.

    Args:
        lr: first step size; used at t = 1 only.
        etas: ``(η-, η+)``.
        step_sizes: smallest and largest step size.

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 2 * w.sum(), mo.optim.Rprop(lr=0.1))
    >>> step(step.init(torch.zeros(1), None), None, None).w  # the first step is -lr · sign(g)
    tensor([-0.1000])
    """

    lr: Hyper = 1e-2
    etas: tuple[Hyper, Hyper] | Hyper = (0.5, 1.2)
    step_sizes: tuple[Hyper, Hyper] | Hyper = (1e-6, 50.0)

    hypers: ClassVar[tuple[str, ...]] = ("lr", "etas", "step_sizes")
    ranges: ClassVar[Mapping[str, Check]] = {"etas": checks.positive, "step_sizes": checks.non_negative}
    pairs: ClassVar[tuple[str, ...]] = ("etas", "step_sizes")

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.etas, tuple):
            checks.unit_interval(self, "etas[0]", self.etas[0], closed="neither")
            checks.within(self, "etas[1]", self.etas[1], 1, math.inf, closed="neither")

    @property
    @override
    def counts_steps(self) -> bool:
        return True

    def init_leaf(self, w: Tensor) -> Slots:
        """Zeros; the first step size is set at t = 1."""
        return {"previous": torch.zeros_like(w), "size": torch.zeros_like(w)}

    @override
    def update_leaf(self, g: Tensor, w: Tensor, slots: Slots, hyper: dict[str, Any], t: int) -> tuple[Tensor, Slots]:
        minus, plus = (safe.like(eta, w) for eta in hyper["etas"])
        smallest, largest = (safe.like(size, w) for size in hyper["step_sizes"])
        size = slots["size"]
        if t == 1:
            size = size + hyper["lr"]

        agreement = g * slots["previous"]
        turned = agreement < 0
        factor = torch.where(turned, minus, torch.ones_like(w))
        factor = torch.where(agreement > 0, plus, factor)
        size = torch.maximum(size * factor, smallest)
        size = torch.minimum(size, largest)

        g = torch.where(turned, torch.zeros_like(g), g)
        return w - g.sign() * size, {"previous": g, "size": size}
