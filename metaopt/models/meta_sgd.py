r"""Meta-SGD: every weight has a learned learning rate of its own.

.. math::
    w_t = w_{t-1} - \lambda \odot \nabla_w \ell\big(f(x;\, w_{t-1}),\, y\big), \qquad \lambda \text{ shaped like } w

Li et al. 2017, arXiv 1707.09835. The initial weights, which Meta-SGD also learns, are
``Hypergradient.initial``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from metaopt import checks, tree
from metaopt.functional import Params, functional
from metaopt.models.base import Loss, MetaModel
from metaopt.optim.sgd import SGD

Rates: TypeAlias = dict[str, Params]


@dataclass(frozen=True)
class MetaSGD(MetaModel):
    """All parameters of a module are weights; ``lam["lr"]`` holds one rate per number. The inner optimiser is :attr:`optimizer`.

    Args:
        model: the wrapped module; :meth:`of` wraps a plain one.
        loss: ``(prediction, target) -> scalar``.
        rate: the initial rate, > 0.

    >>> meta_sgd = MetaSGD.of(nn.Linear(2, 1), nn.functional.mse_loss)
    >>> w, lam = meta_sgd.init()
    >>> lam["lr"]["weight"].shape == w["weight"].shape
    True
    """

    rate: float = 0.01

    def __post_init__(self) -> None:
        """Check the rate."""
        checks.positive(self, "rate", self.rate)

    @classmethod
    def of(cls, module: nn.Module, loss: Loss, rate: float = 0.01) -> MetaSGD:
        """Meta-SGD on a module of your own."""
        return cls(functional(module), loss, rate)

    @property
    def optimizer(self) -> SGD:
        """SGD with the learned rates: hand it to ``mo.inner_step``."""
        return SGD(lr=lambda lam, t: lam["lr"])

    def init(self) -> tuple[Params, Rates]:
        """``(w, lam)``: the module's own initial values, and ``rate`` everywhere."""
        return self.model.params, {"lr": tree.map(lambda x: torch.full_like(x, self.rate), self.model.params)}

    def predict(self, w: Params, lam: Rates, x: Any) -> Any:
        """The network's output; ``lam`` acts through the optimiser alone."""
        return self.model(w, x)
