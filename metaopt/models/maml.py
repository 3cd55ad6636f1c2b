"""MAML: the initial weights are what is learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from metaopt import checks, tree
from metaopt.functional import Params, functional
from metaopt.models.base import Loss, MetaModel


@dataclass(frozen=True)
class MAML(MetaModel):
    r"""The parameters of a module, or some of them, adapt from learned initial values.

    .. math::
        w_t = \phi + \delta_t, \quad \delta_0 = 0, \qquad L(\delta, \phi) = \ell\big(f(x;\, \phi +
        \delta),\, y\big) + \tfrac{\mu}{2} \|\delta\|^2

    The weights of the inner loop are the displacement :math:`w = \delta` and the hyperparameters
    are :math:`\lambda = \phi`, so that every estimator has its meaning: exact reverse mode is MAML,
    the direct term alone is first-order MAML, truncated reverse mode lies between the two, and
    implicit differentiation with :math:`\mu > 0` is iMAML. By the same steps :math:`dL/d\phi` is
    ``Hypergradient.initial`` of the undisplaced problem.

    Finn et al. 2017, `arXiv 1703.03400 <https://arxiv.org/abs/1703.03400>`__; iMAML: Rajeswaran et
    al. 2019, `arXiv 1909.04630 <https://arxiv.org/abs/1909.04630>`__.

    ``lam`` holds the initial values of all parameters, ``w`` the displacement of those that adapt;
    it starts at 0. With ``weights=["head.*"]`` it is ANIL with a learned initial head.

    Weight decay of the inner optimiser pulls towards the initial weights. To draw predictions from
    adapted weights use :meth:`adapted`.

    Args:
        model: the wrapped module; :meth:`of` wraps a plain one.
        loss: ``(prediction, target) -> scalar``.
        proximity: μ ≥ 0, the pull of the inner loss (not the outer one) towards the initial
            weights.
        weights: glob patterns of the parameters that adapt, or a predicate on names; default: all.

    >>> maml = MAML.of(nn.Linear(2, 1), nn.functional.mse_loss)
    >>> w, lam = maml.init()
    >>> float(w["weight"].norm()), lam["weight"].shape
    (0.0, torch.Size([1, 2]))
    """

    proximity: float = 0.0
    weights: str | Sequence[str] | Callable[[str], bool] = "*"

    def __post_init__(self) -> None:
        checks.non_negative(self, "proximity", self.proximity)

    @classmethod
    def of(
        cls,
        module: nn.Module,
        loss: Loss,
        *,
        proximity: float = 0.0,
        weights: str | Sequence[str] | Callable[[str], bool] = "*",
    ) -> MAML:
        """Wraps a plain module, whose parameters become the initial values."""
        return cls(functional(module), loss, proximity, weights)

    def init(self) -> tuple[Params, Params]:
        """``(w, lam)``: no displacement, and the module's own initial values."""
        chosen = tree.matching(self.model.params, self.weights, "parameter")
        w = {name: torch.zeros_like(self.model.params[name]) for name in chosen}
        return w, self.model.params

    def adapted(self, w: Params, lam: Params) -> Params:
        """The module's parameters ``φ + δ``; ``module.load_state_dict(…, strict=False)`` takes them."""
        return {name: phi + w[name] if name in w else phi for name, phi in lam.items()}

    @override
    def predict(self, w: Params, lam: Params, x: Any) -> Any:
        return self.model(self.adapted(w, lam), x)

    def inner_loss(self, w: Params, lam: Params, batch: tuple[Any, Tensor]) -> Tensor:
        """Training loss of one task, with the pull towards the initial weights."""
        loss = super().inner_loss(w, lam, batch)
        if self.proximity == 0:
            return loss
        return loss + 0.5 * self.proximity * tree.dot(w, w)
