"""Stochastic gradient descent with momentum, as ``torch.optim.SGD`` computes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from metaopt import checks
from metaopt.optim.optimizer import Check, Hyper, Optimizer, Slots, is_zero


@dataclass(frozen=True)
class SGD(Optimizer):
    r"""SGD with momentum, dampening, weight decay and Nesterov's variant.

    Equal to ``torch.optim.SGD`` step by step.

    .. math::
        g &\leftarrow g + \text{wd}\, w \\
        v_t &= \mu v_{t-1} + (1 - \text{damp})\, g \;\; (v_1 = g) \\
        w_t &= w_{t-1} - \eta\, (g + \mu v_t \text{ if Nesterov else } v_t)

    Every hyperparameter is a float, a tensor, a pytree like the weights, or a callable ``(lam, t)
    -> any of these``.

    Slots: ``momentum`` (like ``w``), unless momentum is the float 0.

    Args:
        lr: learning rate η.
        momentum: μ; the float 0 keeps no slot.
        dampening: part of the gradient that does not enter the momentum (from the second step on,
            as in torch).
        weight_decay: L2 coefficient, added to the gradient.
        nesterov: look-ahead variant; needs momentum, and dampening 0.

    >>> import torch
    >>> from metaopt.inner.step import inner_step
    >>> step = inner_step(lambda w, lam, batch: 0.5 * ((w - lam) ** 2).sum(), SGD(lr=0.5))
    >>> step(step.init(torch.zeros(2), torch.ones(2)), torch.ones(2), None).w
    tensor([0.5000, 0.5000])
    """

    lr: Hyper
    momentum: Hyper = 0.0
    dampening: Hyper = 0.0
    weight_decay: Hyper = 0.0
    nesterov: bool = False

    hypers: ClassVar[tuple[str, ...]] = ("lr", "momentum", "dampening", "weight_decay")
    ranges: ClassVar[Mapping[str, Check]] = {"dampening": checks.unit_interval}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and (is_zero(self.momentum) or not is_zero(self.dampening)):
            raise ValueError("SGD: nesterov=True needs momentum > 0 and dampening = 0")

    @property
    @override
    def counts_steps(self) -> bool:
        return not is_zero(self.dampening)

    @override
    def init_leaf(self, w: Tensor) -> Slots:
        return {} if is_zero(self.momentum) else {"momentum": torch.zeros_like(w)}

    @override
    def update_leaf(self, g: Tensor, w: Tensor, slots: Slots, hyper: dict[str, Any], t: int) -> tuple[Tensor, Slots]:
        if not is_zero(self.weight_decay):
            g = g + hyper["weight_decay"] * w
        if "momentum" not in slots:
            return _minus(w, hyper["lr"], g), slots
        kept = g if is_zero(self.dampening) or t == 1 else (1.0 - hyper["dampening"]) * g
        v = _plus(kept, hyper["momentum"], slots["momentum"])
        direction = g + hyper["momentum"] * v if self.nesterov else v
        return _minus(w, hyper["lr"], direction), {"momentum": v}

    def transpose_leaf(
        self, w_bar: Tensor, slots_bar: Slots | None, hyper: dict[str, Any], t: int
    ) -> tuple[Tensor, Tensor, Slots]:
        r"""The update's transpose, with :math:`\bar d = -\eta \bar w` the cotangent of the direction.

        .. math:: \bar v \leftarrow \bar v + \bar d, \qquad \bar g = (1 - \text{damp})\, \bar v
        """
        slots: Slots = {}
        if is_zero(self.momentum):
            g_bar = w_bar * -hyper["lr"]
        else:
            mu = hyper["momentum"]
            factor = hyper["lr"] * hyper["momentum"] if self.nesterov else hyper["lr"]
            v_bar = w_bar * -factor if slots_bar is None else _minus(slots_bar["momentum"], factor, w_bar)
            slots = {"momentum": mu * v_bar}
            kept = v_bar if is_zero(self.dampening) or t == 1 else (1.0 - hyper["dampening"]) * v_bar
            g_bar = _minus(kept, hyper["lr"], w_bar) if self.nesterov else kept
        return g_bar, w_bar if is_zero(self.weight_decay) else w_bar + hyper["weight_decay"] * g_bar, slots


def _plus(g: Tensor, factor: float | Tensor, v: Tensor) -> Tensor:
    """``g + factor * v``, as a difference.

    Inductor drops the ``alpha`` of a sum if one of the two comes out of a matrix product (torch
    2.13).
    """
    return g + factor * v if isinstance(factor, Tensor) else torch.sub(g, v, alpha=-factor)


def _minus(w: Tensor, factor: float | Tensor, direction: Tensor) -> Tensor:
    """``w - factor * direction``, in one operation where the factor is a number."""
    return w - factor * direction if isinstance(factor, Tensor) else torch.sub(w, direction, alpha=factor)
