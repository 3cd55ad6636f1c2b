"""What every meta-model has: weights, hyperparameters, and two losses of both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from metaopt.functional import FunctionalModel, Params
from metaopt.inner.step import InnerStep, inner_step
from metaopt.inner.tasks import TaskLoss, vmapped
from metaopt.optim.optimizer import Optimizer
from metaopt.tree import Tree

Loss: TypeAlias = Callable[[Any, Tensor], Tensor]
"""``(prediction, target) -> scalar``, e.g. ``torch.nn.functional.cross_entropy``."""


OverTasks: TypeAlias = Callable[..., TaskLoss]
""":func:`metaopt.vmapped` or :func:`metaopt.looped`."""


@dataclass(frozen=True)
class MetaModel(ABC):
    """A split of a model into weights ``w`` (adapted to a task) and hyperparameters ``lam`` (shared by all tasks).

    The losses are those of one task. :meth:`step` and :meth:`objective` take a meta-batch of tasks.
    Subclasses add settings only.

    Attributes:
        model: the wrapped module.
        loss: ``(prediction, target) -> scalar``.
    """

    model: FunctionalModel
    loss: Loss

    @abstractmethod
    def init(self) -> tuple[Params, Tree]:
        """``(w, lam)`` at their initial values."""

    @abstractmethod
    def predict(self, w: Params, lam: Tree, x: Any) -> Any:
        """The output for inputs ``x``."""

    def step(self, optimizer: Optimizer, *, over: OverTasks = vmapped) -> InnerStep:
        """Φ of a meta-batch: the tasks' inner losses are summed, so that each task trains as if it were alone.

        Args:
            optimizer: the inner optimiser.
            over: :func:`metaopt.vmapped` or :func:`metaopt.looped`.
        """
        return inner_step(over(self.inner_loss), optimizer)

    def objective(self, *, over: OverTasks = vmapped) -> TaskLoss:
        """The outer loss of a meta-batch: the mean over tasks."""
        return over(self.outer_loss, reduction="mean")

    def inner_loss(self, w: Params, lam: Tree, batch: tuple[Any, Tensor]) -> Tensor:
        """Training loss of one task; ``batch = (x, y)``."""
        x, y = batch
        return self.loss(self.predict(w, lam, x), y)

    def outer_loss(self, w: Params, lam: Tree, batch: tuple[Any, Tensor]) -> Tensor:
        """Test loss of one task: the same loss, on other examples."""
        x, y = batch
        return self.loss(self.predict(w, lam, x), y)

    def accuracy(self, w: Params, lam: Tree, batch: tuple[Any, Tensor]) -> Tensor:
        """Share of right answers, a scalar in [0, 1].

        Predictions are scores ``[n, classes]``, targets are class numbers ``[n]``.

        Raises:
            TypeError: if the targets are not class numbers.
        """
        x, y = batch
        if y.is_floating_point():
            raise TypeError(
                f"accuracy counts right classes and needs integer targets, got {y.dtype}; for a regression task take "
                "outer_loss"
            )
        with torch.no_grad():
            scores = self.predict(w, lam, x)
            return (scores.argmax(1) == y).to(scores.dtype).mean()


def per_example(losses: Tensor, targets: Tensor) -> Tensor:
    """``losses`` if there is one for each example.

    Raises:
        ValueError: if not.
    """
    if losses.shape != targets.shape[:1]:
        raise ValueError(
            f"the loss must return one number per example, [{targets.shape[0]}], got a tensor of shape "
            f"{tuple(losses.shape)}: "
            'give it reduction="none", and for several outputs sum over them'
        )
    return losses
