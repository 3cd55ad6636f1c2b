"""Adafactor: Adam with a factored second moment, and no first one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from metaopt import checks
from metaopt.optim import safe
from metaopt.optim.moments import decayed
from metaopt.optim.optimizer import Check, Hyper, Optimizer, Slots


def _non_negative_or_none(owner: object, name: str, value: Any) -> None:
    if value is not None:
        checks.non_negative(owner, name, value)


@dataclass(frozen=True)
class Adafactor(Optimizer):
    r"""Adafactor, equal to ``torch.optim.Adafactor`` step by step.

    Slots: ``row`` and ``column`` (used by matrices), ``second`` (used by vectors).

    .. math::
        R_t \leftarrow \beta R + (1-\beta)\, \text{mean}_{-1}(g^2),\; C_t \leftarrow \beta C +
        (1-\beta)\, \text{mean}_{-2}(g^2),\quad \hat v = \frac{R\, C}{\text{mean}_{-2} R},\quad u =
        \frac{g}{\sqrt{\hat v}},\quad w_t = w_{t-1} - \rho_t \max(\epsilon_2, \text{rms}(w))
        \frac{u}{\max(1, \text{rms}(u)/d)}

    with :math:`\beta = 1 - t^{\text{beta2\_decay}}` and :math:`\rho_t = \min(\eta, 1/\sqrt t)`.
    Shazeer and Stern 2018, `arXiv 1804.04235 <https://arxiv.org/abs/1804.04235>`__.

    It looks at whole tensors (root mean squares): in a stacked meta-batch wrap it in
    :class:`metaopt.optim.PerTask`.

    Args:
        lr: upper bound η of the relative step size.
        beta2_decay: power of the second moment's decay.
        eps: ``(ε1, ε2)``; ε1 ``None`` is the dtype's machine epsilon.
        d: bound on the update's root mean square.
        weight_decay: decoupled weight decay.

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 2 * w.sum(), mo.optim.Adafactor(lr=0.1))
    >>> step(step.init(torch.ones(1), None), None, None).w  # the first step is -lr · rms(w) · sign(g)
    tensor([0.9000])
    """

    lr: Hyper = 1e-2
    beta2_decay: Hyper = -0.8
    eps: tuple[Hyper | None, Hyper] = (None, 1e-3)
    d: Hyper = 1.0
    weight_decay: Hyper = 0.0

    decoupled: ClassVar[bool] = True
    hypers: ClassVar[tuple[str, ...]] = ("lr", "beta2_decay", "eps", "d", "weight_decay")
    ranges: ClassVar[Mapping[str, Check]] = {
        "beta2_decay": partial(checks.within, low=-math.inf, high=0, closed="right"),
        "eps": _non_negative_or_none,
        "d": checks.positive,
    }
    pairs: ClassVar[tuple[str, ...]] = ("eps",)

    @property
    @override
    def elementwise(self) -> bool:
        return False

    @property
    @override
    def counts_steps(self) -> bool:
        return True

    def init_leaf(self, w: Tensor) -> Slots:
        """Zeros; what a tensor of this rank does not use is empty."""
        empty = w.new_zeros(0)
        if w.ndim > 1:
            return {"row": torch.zeros_like(w[..., :1]), "column": torch.zeros_like(w[..., :1, :]), "second": empty}
        return {"row": empty, "column": empty, "second": torch.zeros_like(w)}

    @override
    def update_leaf(self, g: Tensor, w: Tensor, slots: Slots, hyper: dict[str, Any], t: int) -> tuple[Tensor, Slots]:
        eps1, eps2 = hyper["eps"]
        if eps1 is None:
            eps1 = torch.finfo(w.dtype).eps
        share = t ** hyper["beta2_decay"]
        rate = torch.minimum(safe.like(hyper["lr"], w), safe.like(t**-0.5, w))
        size = rate * torch.maximum(safe.like(eps2, w), _rms(w))
        _, w = decayed(g, w, hyper, decoupled=True)

        new = dict(slots)
        squared = g * g
        if g.ndim > 1:
            row = _moved(slots["row"], squared.mean(-1, keepdim=True), share)
            column = _moved(slots["column"], squared.mean(-2, keepdim=True), share)
            new |= {"row": row, "column": column}
            mean = torch.maximum(row.mean(-2, keepdim=True), safe.like(eps1, w))
            estimate = row @ column / mean
        else:
            estimate = _moved(slots["second"], squared, share)
            new["second"] = estimate

        floor = safe.like(eps1 * eps1, w)
        update = g * torch.maximum(estimate, floor).rsqrt()
        clip = torch.maximum(safe.like(1.0, w), _rms(update) / hyper["d"])
        return w - size / clip * update, new


def _moved(mean: Tensor, value: Tensor, share: Any) -> Tensor:
    """A running mean, after it has taken in a share of the new value."""
    return mean + share * (value - mean)


def _rms(x: Tensor) -> Tensor:
    return safe.sqrt((x * x).mean())
