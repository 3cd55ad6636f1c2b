"""Muon: momentum, orthogonalised by a Newton-Schulz iteration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from metaopt import checks
from metaopt.optim import safe
from metaopt.optim.moments import decayed
from metaopt.optim.optimizer import Check, Hyper, Optimizer, Slots


@dataclass(frozen=True)
class Muon(Optimizer):
    r"""Muon, equal to ``torch.optim.Muon`` step by step. Slot: ``momentum``.

    .. math::
        m_t = \mu m_{t-1} + (1-\mu) g,\quad X_0 = \frac{u}{\|u\|},\quad X \leftarrow aX + (bXX^\top
        + c(XX^\top)^2)X,\quad w_t = (1 - \eta\,\text{wd})\, w_{t-1} - \eta \sqrt{\max(1, r/c)}\;
        X_K

    Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".

    For matrices only: give other tensors to another optimiser with :class:`metaopt.optim.Groups`.
    In a stacked meta-batch wrap it in :class:`metaopt.optim.PerTask`.

    Args:
        lr: learning rate η.
        weight_decay: decoupled weight decay.
        momentum: μ.
        nesterov: look-ahead variant.
        ns_coefficients: ``(a, b, c)`` of the iteration.
        eps: smallest norm that is divided by.
        ns_steps: K.
        adjust_lr_fn: how the rate depends on the shape: ``"original"`` (as above) or
            ``"match_rms_adamw"`` (``0.2 √max(rows, columns)``).
        dtype: of the iteration. torch's bfloat16 gives torch's numbers, with derivatives good to
            two digits; ``None``, the weights' own dtype, gives exact derivatives.

    >>> import metaopt as mo, torch
    >>> rule = mo.optim.Muon(lr=0.1, ns_coefficients=(1.5, -0.5, 0.0))
    >>> step = mo.inner_step(lambda w, lam, _: 2 * w.sum(), rule)
    >>> step(step.init(torch.zeros(1, 1), None), None, None).w  # a 1 × 1 matrix is orthogonal when it is ±1
    tensor([[-0.1000]])
    """

    lr: Hyper = 1e-3
    weight_decay: Hyper = 0.1
    momentum: Hyper = 0.95
    nesterov: bool = True
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315)
    eps: float = 1e-7
    ns_steps: int = 5
    adjust_lr_fn: Literal["original", "match_rms_adamw"] | None = None
    dtype: torch.dtype | None = torch.bfloat16

    decoupled: ClassVar[bool] = True
    hypers: ClassVar[tuple[str, ...]] = ("lr", "weight_decay", "momentum")
    ranges: ClassVar[Mapping[str, Check]] = {
        "ns_coefficients": partial(checks.instance, kind=(tuple, list), remedy="three numbers (a, b, c)"),
        "ns_steps": checks.count,
        "dtype": partial(checks.instance, kind=(torch.dtype, type(None))),
        "adjust_lr_fn": partial(checks.one_of, allowed=(None, "original", "match_rms_adamw")),
    }

    @property
    @override
    def elementwise(self) -> bool:
        return False

    @override
    def init_leaf(self, w: Tensor) -> Slots:
        if w.ndim != 2:
            raise ValueError(
                f"Muon updates matrices, got a weight of shape {tuple(w.shape)}: give it to another optimiser with "
                "mo.optim.Groups"
            )
        return {"momentum": torch.zeros_like(w)}

    @override
    def update_leaf(self, g: Tensor, w: Tensor, slots: Slots, hyper: dict[str, Any], t: int) -> tuple[Tensor, Slots]:
        mu = hyper["momentum"]
        momentum = slots["momentum"] + (1 - mu) * (g - slots["momentum"])
        direction = g + mu * (momentum - g) if self.nesterov else momentum
        rows, columns = w.shape
        if self.adjust_lr_fn == "match_rms_adamw":
            ratio = 0.2 * math.sqrt(max(rows, columns))
        else:
            ratio = math.sqrt(max(1.0, rows / columns))
        _, w = decayed(g, w, hyper, decoupled=True)
        rate = hyper["lr"] * ratio
        return w - rate * self._orthogonalised(direction), {"momentum": momentum}

    def _orthogonalised(self, direction: Tensor) -> Tensor:
        a, b, c = self.ns_coefficients
        x = direction if self.dtype is None else direction.to(self.dtype)
        tall = x.shape[0] > x.shape[1]
        if tall:
            x = x.mT
        size = safe.sqrt((x * x).sum()) if self.dtype is None else x.norm()
        x = x / torch.maximum(size, safe.like(self.eps, x))
        for _ in range(self.ns_steps):
            gram = x @ x.mT
            polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
            x = torch.addmm(x, polynomial, x, beta=a)
        if tall:
            x = x.mT
        return x.to(direction.dtype)
