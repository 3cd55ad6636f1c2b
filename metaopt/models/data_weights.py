"""Data weights: one hyperparameter per training example."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from metaopt import checks
from metaopt.functional import Params, functional
from metaopt.models.base import Loss, MetaModel, per_example


class Weighting(Protocol):
    """λ, one number per example, to weights."""

    @property
    def start(self) -> float:
        """λ at the start, for every example."""
        ...

    def __call__(self, lam: Tensor) -> Tensor:
        """A weight for each number of λ: ``[N] -> [N]``."""
        ...


@dataclass(frozen=True)
class RawWeights:
    """``v = λ``: a weight may be negative.

    Args:
        start: the initial weight.
    """

    start: float = 1.0

    def __call__(self, lam: Tensor) -> Tensor:
        """λ itself, which may be negative."""
        return lam


@dataclass(frozen=True)
class SigmoidWeights:
    """``v = σ(λ)``, each in (0, 1) for itself.

    Args:
        start: the initial λ; 0 is a weight of ½.
    """

    start: float = 0.0

    def __call__(self, lam: Tensor) -> Tensor:
        """The logistic function of each λ."""
        return torch.sigmoid(lam)


@dataclass(frozen=True)
class SoftmaxWeights:
    """``v = N softmax(λ)``: positive, with mean 1; all examples compete.

    Args:
        start: the initial λ; any number is a weight of 1.
    """

    start: float = 0.0

    def __call__(self, lam: Tensor) -> Tensor:
        """N times the softmax over all examples."""
        return lam.shape[0] * torch.softmax(lam, 0)


@dataclass(frozen=True)
class DataWeights(MetaModel):
    r"""All parameters of a module are weights.

    ``lam`` is a vector with a number for each of N training examples.

    .. math::
        L(w, \lambda; (x, y, i)) = \frac{1}{n} \sum_{k=1}^{n} v_{i_k}(\lambda)\; \ell\big(f(x_k;
        w),\, y_k\big)

    with :math:`v = \lambda`, :math:`\sigma(\lambda)` or :math:`N\, \mathrm{softmax}(\lambda)` over
    all N examples. The outer loss is the plain mean over clean examples, so that there is no direct
    term. Data hyper-cleaning: Franceschi et al. 2017, `arXiv 1703.01785
    <https://arxiv.org/abs/1703.01785>`__; Ren et al. 2018, `arXiv 1803.09050
    <https://arxiv.org/abs/1803.09050>`__.

    A batch of the inner loss is ``(x, y, which)``, with the examples' numbers 0 … N-1 as the third;
    one of the outer loss is ``(x, y)``.

    Args:
        model: the wrapped module; :meth:`of` wraps a plain one.
        loss: ``(prediction, target) -> one number per example``.
        examples: N.
        weighting: :class:`RawWeights`, :class:`SigmoidWeights` or :class:`SoftmaxWeights`.

    >>> from functools import partial
    >>> per_example = partial(nn.functional.cross_entropy, reduction="none")
    >>> cleaning = DataWeights.of(nn.Linear(4, 3), per_example, examples=100, weighting=SigmoidWeights())
    >>> w, lam = cleaning.init()
    >>> inputs = torch.ones(5, 4)
    >>> targets = torch.tensor([0, 1, 2, 0, 1])
    >>> examples = torch.tensor([7, 99, 0, 3, 3])
    >>> lam.shape, cleaning.inner_loss(w, lam, (inputs, targets, examples)).shape
    (torch.Size([100]), torch.Size([]))
    """

    examples: int
    weighting: Weighting = RawWeights()

    def __post_init__(self) -> None:
        checks.count(self, "examples", self.examples)

    @classmethod
    def of(cls, module: nn.Module, loss: Loss, *, examples: int, weighting: Weighting = RawWeights()) -> DataWeights:
        """Data weights around your own module."""
        return cls(functional(module), loss, examples, weighting)

    def init(self) -> tuple[Params, Tensor]:
        """``(w, lam)``: the module's own initial values, and the weighting's start for every example."""
        like = next(iter(self.model.params.values()))
        return self.model.params, torch.full(
            (self.examples,), self.weighting.start, dtype=like.dtype, device=like.device
        )

    def predict(self, w: Params, lam: Tensor, x: Any) -> Any:
        """The module's output; ``lam`` acts through the inner loss alone."""
        return self.model(w, x)

    def inner_loss(self, w: Params, lam: Tensor, batch: Any) -> Tensor:
        """The weighted mean loss; ``batch = (x, y, which)``.

        Raises:
            ValueError: if the batch does not say which examples it holds, or λ has not one number
                for each of N.
        """
        if len(batch) != 3:
            raise ValueError(f"a batch of weighted examples is (x, y, which examples), got {len(batch)} parts")
        if lam.shape != (self.examples,):
            raise ValueError(f"lam needs one number for each of {self.examples} examples, got shape {tuple(lam.shape)}")
        x, y, which = batch
        return (self.weighting(lam)[which] * per_example(self.loss(self.model(w, x), y), y)).mean()

    def outer_loss(self, w: Params, lam: Tensor, batch: tuple[Any, Tensor]) -> Tensor:
        """The mean loss, every example counting the same."""
        x, y = batch
        return per_example(self.loss(self.model(w, x), y), y).mean()
