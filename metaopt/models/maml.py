r"""MAML: the initial weights are what is learned.

.. math::
    w_t = \phi + \delta_t, \quad \delta_0 = 0, \qquad L(\delta, \phi) = \ell\big(f(x;\, \phi + \delta),\, y\big) + \tfrac{\mu}{2} \|\delta\|^2

The weights of the inner loop are the displacement :math:`w = \delta` and the hyperparameters are
:math:`\lambda = \phi`, so that every estimator has its meaning: exact reverse mode is MAML, the
direct term alone is first-order MAML, truncated reverse mode lies between the two, and implicit
differentiation with :math:`\mu > 0` is iMAML. By the same steps :math:`dL/d\phi` is
``Hypergradient.initial`` of the undisplaced problem.

Finn et al. 2017, arXiv 1703.03400; iMAML: Rajeswaran et al. 2019, arXiv 1909.04630.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metaopt import checks, tree
from metaopt.functional import Params, functional
from metaopt.models.base import Loss, MetaModel


@dataclass(frozen=True)
class MAML(MetaModel):
    """All parameters of a module adapt, from learned initial values ``lam``.

    ``w`` is the displacement from them, and starts at 0.

    Weight decay of the inner optimiser pulls towards the initial weights. To draw predictions from
    adapted weights use :meth:`adapted`.

    Args:
        model: the wrapped module; :meth:`of` wraps a plain one.
        loss: ``(prediction, target) -> scalar``.
        proximity: μ ≥ 0, the pull of the inner loss (not the outer one) towards the initial
            weights.

    >>> maml = MAML.of(nn.Linear(2, 1), nn.functional.mse_loss)
    >>> w, lam = maml.init()
    >>> float(w["weight"].norm()), lam["weight"].shape
    (0.0, torch.Size([1, 2]))
    """

    proximity: float = 0.0

    def __post_init__(self) -> None:
        """Check μ."""
        checks.non_negative(self, "proximity", self.proximity)

    @classmethod
    def of(cls, module: nn.Module, loss: Loss, *, proximity: float = 0.0) -> MAML:
        """MAML on a module of your own."""
        return cls(functional(module), loss, proximity)

    def init(self) -> tuple[Params, Params]:
        """``(w, lam)``: no displacement, and the module's own initial values."""
        return tree.map(torch.zeros_like, self.model.params), self.model.params

    def adapted(self, w: Params, lam: Params) -> Params:
        """The module's parameters ``φ + δ``."""
        return {name: phi + w[name] for name, phi in lam.items()}

    def predict(self, w: Params, lam: Params, x: Any) -> Any:
        """The network's output."""
        return self.model(self.adapted(w, lam), x)

    def inner_loss(self, w: Params, lam: Params, batch: tuple[Any, Tensor]) -> Tensor:
        """Training loss of one task, with the pull towards the initial weights."""
        loss = super().inner_loss(w, lam, batch)
        return loss if self.proximity == 0 else loss + 0.5 * self.proximity * tree.dot(w, w)
