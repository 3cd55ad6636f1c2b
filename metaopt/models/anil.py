"""ANIL: almost no inner loop. The head adapts to the task, the body is meta-learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from typing_extensions import override

from metaopt.functional import Params, functional, merge, partition
from metaopt.models.base import Loss, MetaModel


@dataclass(frozen=True)
class ANIL(MetaModel):
    r"""Any module, split by parameter name into weights (adapted) and hyperparameters (shared by all tasks).

    .. math::
        w = \text{head}, \quad \lambda = \text{body}, \qquad L(w, \lambda; (x, y)) = \ell\big(f(x;\,
        w, \lambda),\, y\big)

    Raghu et al. 2020, `arXiv 1909.09157 <https://arxiv.org/abs/1909.09157>`__.

    The initial head is not among the hyperparameters, as in the HyperDistill paper, where it learns
    by its own rule (``initial=`` of :func:`metaopt.tune`). With ``MAML.of(module, loss,
    weights=["head.*"])`` it is learned exactly, together with the body.

    Args:
        model: the wrapped module; a plain ``nn.Module`` is wrapped for you by :meth:`of`.
        loss: ``(prediction, target) -> scalar``.
        weights: glob patterns of the parameters that adapt, or a predicate on names. The
            HyperDistill paper's image model is ``conv_net(4, 32, ...)`` with ``["block4.*",
            "head.*"]``.

    >>> import torch
    >>> module = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> anil = ANIL.of(module, nn.functional.mse_loss, weights=["2.*"])
    >>> w, lam = anil.init()
    >>> sorted(w), sorted(lam)
    (['2.bias', '2.weight'], ['0.bias', '0.weight'])
    >>> anil.inner_loss(w, lam, (torch.ones(3, 1), torch.ones(3, 1))).shape
    torch.Size([])
    """

    weights: Sequence[str] | Callable[[str], bool]

    @classmethod
    def of(cls, module: nn.Module, loss: Loss, *, weights: Sequence[str] | Callable[[str], bool]) -> ANIL:
        """ANIL on your own module."""
        return cls(functional(module), loss, weights)

    def init(self) -> tuple[Params, Params]:
        """``(w, lam)`` at the module's own initial values."""
        return partition(self.model.params, self.weights)

    @override
    def predict(self, w: Params, lam: Params, x: Any) -> Any:
        return self.model(merge(w, lam), x)


def sinusoid_net(width: int = 100) -> nn.Sequential:
    """The sinusoid experiments' 1-100-100-100-1 ReLU network; its last layer is ``"6"``."""
    return nn.Sequential(
        nn.Linear(1, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 1),
    )
