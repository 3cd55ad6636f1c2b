"""Representation transformation network (MetaXL): a learned map between two layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metaopt.functional import FunctionalModel, Params, functional, merge
from metaopt.models.base import Loss, MetaModel
from metaopt.models.insertion import channels_of, choose, insert, split


@dataclass(frozen=True)
class RTN(MetaModel):
    r"""A module with representation transformations behind chosen layers; features are the last axis.

    A learned, gated residual on the hidden representation of source examples.

    .. math::
        h \leftarrow h + \sigma(s)\, r, \qquad (r, s) = W_2\, \mathrm{ReLU}(W_1 h + b_1) + b_2

    The weights are the module's own parameters, λ is the transformation. The inner loss (source
    domain) has it, the outer loss (target domain) is that of the plain module, so that there is no
    direct term. The gradient passes through both uses of h, so that the update is the gradient of a
    loss. Xia et al. 2021, `arXiv 2104.07908 <https://arxiv.org/abs/2104.07908>`__.

    Args:
        model: the wrapped module with the transformations; :meth:`of` puts them in.
        loss: ``(prediction, target) -> scalar``.
        plain: the wrapped module without them.

    >>> module = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 3))
    >>> rtn = RTN.of(module, nn.functional.cross_entropy, after=["0"], bottleneck=4)
    >>> w, lam = rtn.init()
    >>> {name: tuple(p.shape) for name, p in lam.items() if "weight" in name}
    {'0.inserted.down.weight': (4, 6), '0.inserted.up.weight': (7, 4)}
    """

    plain: FunctionalModel

    @classmethod
    def of(
        cls, module: nn.Module, loss: Loss, *, after: Sequence[str], bottleneck: int, features: int | None = None
    ) -> RTN:
        """Representation transformations put into your own module, which stays as it is.

        Args:
            module: any module.
            loss: ``(prediction, target) -> scalar``.
            after: glob patterns of the layers to transform.
            bottleneck: width of the hidden layer, ≥ 1.
            features: of the layers' outputs; default: read off each layer.

        Raises:
            ValueError: if there is no such layer, or one whose width cannot be read off it, or if
                the bottleneck is empty.
        """
        if bottleneck < 1:
            raise ValueError(f"the transformation needs a bottleneck of at least 1, got {bottleneck}")
        names = choose(module, after, nn.Module)
        with_rtn = insert(module, names, lambda layer: _Transformation(features or channels_of(layer), bottleneck))
        return cls(with_rtn, loss, functional(module))

    def init(self) -> tuple[Params, Params]:
        """``(w, lam)`` at their initial values."""
        return split(self.model.params)

    def predict(self, w: Params, lam: Params, x: Any) -> Any:
        """The plain module's output; ``lam`` acts through the inner loss alone."""
        return self.plain(w, x)

    def inner_loss(self, w: Params, lam: Params, batch: tuple[Any, Tensor]) -> Tensor:
        """Training loss on source examples, transformed."""
        x, y = batch
        return self.loss(self.model(merge(w, lam), x), y)


class _Transformation(nn.Module):
    def __init__(self, features: int, bottleneck: int) -> None:
        super().__init__()
        self.down = nn.Linear(features, bottleneck)
        self.up = nn.Linear(bottleneck, features + 1)

    def forward(self, h: Tensor) -> Tensor:
        out = self.up(torch.relu(self.down(h)))
        return h + torch.sigmoid(out[..., -1:]) * out[..., :-1]
