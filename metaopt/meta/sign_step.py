"""The sign step: steps whose size does not depend on the hypergradient's, halved where its sign flips."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class SignStep(Optimizer):
    r"""An outer optimiser. An entry whose gradient is zero stays, and remembers its last sign.

    .. math::
        s_k = \begin{cases} s_{k-1} / 2 & \text{if } \operatorname{sign} g_k = -\operatorname{sign}
        g_{k-1} \\ s_{k-1} & \text{otherwise} \end{cases}, \qquad \lambda \leftarrow \lambda - s_k
        \operatorname{sign} g_k \qquad \text{per entry, } s_0 = \text{lr}

    Hypergradients through long runs have sizes that mean little (they explode and vanish), and
    signs that mean more. Used for FDS: Micaelli & Storkey 2021, `arXiv 2007.07869
    <https://arxiv.org/abs/2007.07869>`__. Without growing steps, Rprop (Riedmiller & Braun 1993).

    Args:
        params: leaves of λ, or groups of them with an ``lr`` each.
        lr: first step s_0.
        shrink: factor on a flip of the sign.

    Raises:
        ValueError: for a step that is not positive, or a factor outside (0, 1].

    >>> lam = torch.tensor([1.0], requires_grad=True)
    >>> optimizer = SignStep([lam], lr=0.4)
    >>> for _ in range(3):
    ...     lam.grad = 2 * lam.detach() - 1.0
    ...     optimizer.step()
    >>> lam
    tensor([0.4000], requires_grad=True)
    """

    def __init__(self, params: Any, lr: float = 0.1, shrink: float = 0.5) -> None:
        super().__init__(params, {"lr": lr, "shrink": shrink})
        for group in self.param_groups:
            if not group["lr"] > 0:
                raise ValueError(f"SignStep: lr must be positive, got {group['lr']}")
            if not 0 < group["shrink"] <= 1:
                raise ValueError(f"SignStep: shrink must lie in (0, 1], got {group['shrink']}")

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, closure: Callable[[], Any] | None = None
    ) -> Any:
        """One step. State per parameter: ``scale`` (step / lr) and ``sign``."""
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                sign = p.grad.sign()
                if not state:
                    state["scale"] = torch.ones_like(p)
                    state["sign"] = torch.zeros_like(p)
                state["scale"] = torch.where(sign * state["sign"] < 0, group["shrink"] * state["scale"], state["scale"])
                state["sign"] = torch.where(sign == 0, state["sign"], sign)
                p.sub_(group["lr"] * state["scale"] * sign)
        return value
