"""MetaWeightNet: a small network reads an example's loss and says how much the example counts."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from typing_extensions import override

from metaopt import checks
from metaopt.functional import FunctionalModel, Params, functional
from metaopt.inner.reweighted import reweighted
from metaopt.layers.eager import eager
from metaopt.models.base import Loss, MetaModel, per_example

FAR = 7.0
"""Outputs of a weight net that are all further than this from 0, on one side, are called saturated: σ(7) = .999."""


class SaturatedWarning(UserWarning):
    """A weight net gives all examples of a batch the weight 0 or 1."""


Squash: TypeAlias = Callable[[Tensor], Tensor]
"""The weight net's output to weights, element by element."""

Coefficients: TypeAlias = Callable[[Tensor], Tensor]
"""Weights ``[n]`` of a batch to the numbers that multiply the losses before they are summed."""


@dataclass(frozen=True)
class _Floor(ABC):
    floor: float = 0.0

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Weights ``[n]``, no less than the floor, from the numbers that the net gives."""

    def __post_init__(self) -> None:
        checks.unit_interval(self, "floor", self.floor, closed="left")


@dataclass(frozen=True)
class SigmoidAbove(_Floor):
    r""":math:`v = f + (1-f)\,\sigma(x)`: a weight in (f, 1), with a slope everywhere.

    Args:
        floor: f, in [0, 1).
    """

    @override
    def __call__(self, x: Tensor) -> Tensor:
        return self.floor + (1 - self.floor) * torch.sigmoid(x)


@dataclass(frozen=True)
class SigmoidClamped(_Floor):
    r""":math:`v = \max(f, \sigma(x))`.

    No slope where the floor holds, so that such an example teaches the weight net nothing.

    Args:
        floor: f, in [0, 1).
    """

    @override
    def __call__(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x).clamp_min(self.floor)


def batch_mean(weights: Tensor) -> Tensor:
    """``v_i / n``: small weights make small steps."""
    return weights / weights.shape[0]


def batch_normalised(weights: Tensor) -> Tensor:
    """``v_i / Σ_j v_j``: only the ratios of weights count."""
    return weights / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)


@dataclass(frozen=True)
class MetaWeightNet(MetaModel):
    r"""All parameters of a classifier (or any model) are weights; ``lam`` is the weight net.

    .. math::
        w_t = w_{t-1} - \eta \sum_i c_i\, \nabla_w \ell_i(w_{t-1}), \qquad
        c = \text{coefficients}(v), \quad v_i = \sigma_{\ge}\big(V_\lambda(\ell_i(w_{t-1}))\big)

    with :math:`c_i = v_i / n`, or :math:`v_i / \sum_j v_j`. λ is the weight net; the outer loss is
    the plain mean over clean examples, so that there is no direct term. The update takes the
    weights :math:`c_i` as constants: it is not the gradient of :math:`\sum c_i \ell_i`. Its
    derivative is exact all the same, the way the weights change with w included
    (:func:`metaopt.inner.reweighted`).

    Shu et al. 2019, `arXiv 1902.07379 <https://arxiv.org/abs/1902.07379>`__; with the lower bound
    Lee et al. 2022, `arXiv 2110.02508 <https://arxiv.org/abs/2110.02508>`__.

    Args:
        model: the wrapped classifier; :meth:`of` wraps a plain one.
        loss: ``(prediction, target) -> one number per example``.
        weight_net: ``[n, 1] -> [n, 1]``.
        squash: :class:`SigmoidAbove` (default; floor 0.1 is the HyperDistill paper's bound) or
            :class:`SigmoidClamped`.
        coefficients: :func:`batch_normalised` (default: only the ratios of weights count) or
            :func:`batch_mean`, with which all weights of an ordinary classifier soon go to 1.

    >>> from functools import partial
    >>> per_example = partial(nn.functional.cross_entropy, reduction="none")
    >>> weight_net = MetaWeightNet.of(nn.Linear(4, 3), per_example, hidden=200, squash=SigmoidAbove(0.1))
    >>> w, lam = weight_net.init()
    >>> sorted(w), {name: tuple(p.shape) for name, p in lam.items()}
    (['bias', 'weight'], {'0.weight': (200, 1), '0.bias': (200,), '2.weight': (1, 200), '2.bias': (1,)})
    >>> weight_net.inner_loss(w, lam, (torch.ones(5, 4), torch.arange(5) % 3)).shape
    torch.Size([])
    """

    weight_net: FunctionalModel
    squash: Squash = SigmoidAbove()
    coefficients: Coefficients = batch_normalised

    @classmethod
    def of(
        cls,
        module: nn.Module,
        loss: Loss,
        *,
        hidden: int = 100,
        squash: Squash = SigmoidAbove(),
        coefficients: Coefficients = batch_normalised,
    ) -> MetaWeightNet:
        """A weight net of one hidden ReLU layer, 1-``hidden``-1, around your own module.

        Its dtype and device are the module's.
        """
        model = functional(module)
        like = next(iter(model.params.values()))
        weight_net = nn.Sequential(nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, 1)).to(like.device, like.dtype)
        return cls(model, loss, functional(weight_net), squash, coefficients)

    def init(self) -> tuple[Params, Params]:
        """``(w, lam)`` at the modules' own initial values."""
        return self.model.params, self.weight_net.params

    def predict(self, w: Params, lam: Params, x: Any) -> Any:
        """The classifier's output; ``lam`` acts through the inner loss alone."""
        return self.model(w, x)

    def weights(self, lam: Params, losses: Tensor) -> Tensor:
        """The learned weighting curve: ``v`` at the given losses ``[n]``."""
        return self.squash(self._scores(lam, losses))

    def _scores(self, lam: Params, losses: Tensor) -> Tensor:
        return self.weight_net(lam, losses.unsqueeze(-1)).squeeze(-1)

    def inner_loss(self, w: Params, lam: Params, batch: tuple[Any, Tensor]) -> Tensor:
        """``Σ_i c_i ℓ_i``, whose gradient with respect to ``w`` is the update above."""
        x, y = batch
        losses = per_example(self.loss(self.model(w, x), y), y)

        def coefficients(held: Tensor) -> Tensor:
            scores = self._scores(lam, held)
            self._check_saturation(scores)
            return self.coefficients(self.squash(scores))

        return reweighted(losses, coefficients).sum()

    def _check_saturation(self, scores: Tensor) -> None:
        if len(scores) < 2 or scores.device.type != "cpu" or not eager():
            return
        scores = scores.detach()
        if float(scores.min()) > FAR or float(scores.max()) < -FAR:
            weight = float(self.squash(scores).mean())
            warnings.warn(
                f"all weights of the batch are {weight:.2f}: the weight net has saturated, its gradient vanishes, and "
                "all examples count the same. Take a smaller outer learning rate, and coefficients=batch_normalised",
                SaturatedWarning,
                stacklevel=2,
            )

    def outer_loss(self, w: Params, lam: Params, batch: tuple[Any, Tensor]) -> Tensor:
        """The mean loss, every example counting the same."""
        x, y = batch
        return per_example(self.loss(self.model(w, x), y), y).mean()
