"""Meta-SGD: initial weights and a learning rate for every weight, both learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from typing_extensions import override

from metaopt import checks, tree
from metaopt.functional import Params, functional
from metaopt.models.base import Loss, MetaModel
from metaopt.optim.by import by
from metaopt.optim.sgd import SGD

InitialAndRates: TypeAlias = dict[str, Params]


@dataclass(frozen=True)
class MetaSGD(MetaModel):
    r"""All parameters of a module adapt, each by its own learned rate, from learned initial values.

    .. math::
        w_t = w_{t-1} - \rho \odot \nabla_w \ell\big(f(x;\, \phi + w_{t-1}),\, y\big), \qquad w_0 =
        0, \quad \lambda = (\phi, \rho)

    ``w`` is the displacement from the initial values. ``lam["initial"]`` holds those, ``lam["lr"]``
    one rate per number; both are shaped like the parameters. :attr:`optimizer` is the inner
    optimiser.

    Reference: `Li et al. 2017 <https://arxiv.org/abs/1707.09835>`_.

    Args:
        model: the wrapped module; :meth:`of` wraps a plain one.
        loss: ``(prediction, target) -> scalar``.
        rate: the initial rate, > 0.

    >>> meta_sgd = MetaSGD.of(nn.Linear(2, 1), nn.functional.mse_loss)
    >>> w, lam = meta_sgd.init()
    >>> lam["lr"]["weight"].shape == lam["initial"]["weight"].shape == w["weight"].shape
    True
    """

    rate: float = 0.01

    def __post_init__(self) -> None:
        checks.positive(self, "rate", self.rate)

    @classmethod
    def of(cls, module: nn.Module, loss: Loss, *, rate: float = 0.01) -> MetaSGD:
        """Meta-SGD on your own module."""
        return cls(functional(module), loss, rate)

    @property
    def optimizer(self) -> SGD:
        """SGD with the learned rates."""
        return SGD(lr=by("lr"))

    def init(self) -> tuple[Params, InitialAndRates]:
        """``(w, lam)``: no displacement, the module's own initial values, and ``rate`` everywhere."""
        initial = self.model.params
        rates = tree.map(lambda x: torch.full_like(x, self.rate), initial)
        return tree.map(torch.zeros_like, initial), {"initial": initial, "lr": rates}

    def adapted(self, w: Params, lam: InitialAndRates) -> Params:
        """The module's parameters ``φ + w``; ``module.load_state_dict(…, strict=False)`` takes them."""
        return {name: phi + w[name] for name, phi in lam["initial"].items()}

    @override
    def predict(self, w: Params, lam: InitialAndRates, x: Any) -> Any:
        return self.model(self.adapted(w, lam), x)
