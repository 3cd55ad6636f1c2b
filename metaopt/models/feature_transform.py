"""Learned feature-wise transformation (LFT): noise on features, of learned size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metaopt.functional import FunctionalModel, Params, functional, merge
from metaopt.models.base import Loss, MetaModel
from metaopt.models.insertion import channels_of, choose, insert, split

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class FeatureTransform(MetaModel):
    r"""A module with feature-wise noise of learned size behind its normalisation layers.

    Noise of learned size on normalised features, so that a model learns to cross domains.

    .. math::
        y = \big(1 + \varepsilon_\gamma\, s(\gamma)\big) \odot \mathrm{BN}(x) + \varepsilon_\beta\,
        s(\beta), \qquad s(z) = \tfrac{1}{100} \log(1 + e^{100 z}), \quad \varepsilon \sim N(0, 1)
        \text{ per channel}

    The weights are the module's own parameters, λ is every γ and β. The inner loss (seen domain) is
    noisy, the outer loss (unseen domain) is that of the plain module, so that there is no direct
    term. Tseng et al. 2020, `arXiv 2001.08735 <https://arxiv.org/abs/2001.08735>`__.

    The noise of a step comes from torch's global generator, whose state estimators record and
    replay, or from the batch: ``(x, y, model.noise(generator))``.

    Args:
        model: the wrapped module with the transformations; :meth:`of` puts them in.
        loss: ``(prediction, target) -> scalar``.
        plain: the wrapped module without them.

    >>> from metaopt.models import conv_net
    >>> lft = FeatureTransform.of(conv_net(1, 4, classes=2, in_channels=1, image_size=4), nn.functional.cross_entropy)
    >>> w, lam = lft.init()
    >>> {name: tuple(p.shape) for name, p in lam.items()}
    {'block1.norm.inserted.gamma': (4,), 'block1.norm.inserted.beta': (4,)}
    >>> batch = torch.randn(3, 1, 4, 4), torch.tensor([0, 1, 0]), lft.noise(torch.Generator().manual_seed(0))
    >>> bool(lft.inner_loss(w, lam, batch) == lft.inner_loss(w, lam, batch)), lft.outer_loss(w, lam, batch[:2]).shape
    (True, torch.Size([]))
    """

    plain: FunctionalModel

    @classmethod
    def of(
        cls, module: nn.Module, loss: Loss, *, after: Sequence[str] | None = None, gamma: float = 0.3, beta: float = 0.5
    ) -> FeatureTransform:
        """Feature-wise transformations put into your own module, which stays as it is.

        Args:
            module: any module; under a stacked meta-batch its normalisation layers must not track
                running statistics.
            loss: ``(prediction, target) -> scalar``.
            after: glob patterns of the layers to transform, which give ``[n, channels, ...]``;
                default: every batch normalisation.
            gamma: initial γ.
            beta: initial β.

        Raises:
            ValueError: if there is no such layer.
        """
        names = choose(module, after, _NORMS)
        return cls(
            insert(module, names, lambda layer: _Transform(channels_of(layer), gamma, beta)), loss, functional(module)
        )

    def init(self) -> tuple[Params, Params]:
        """``(w, lam)`` at their initial values."""
        return split(self.model.params)

    def predict(self, w: Params, lam: Params, x: Any) -> Any:
        """The plain module's output; ``lam`` acts through the inner loss alone."""
        return self.plain(w, x)

    def noise(self, generator: torch.Generator | None = None) -> Params:
        """One draw of every ε, for a batch (default: from torch's global generator)."""
        noisy = {name: b for name, b in self.model.buffers.items() if name.endswith(_NOISE)}
        return {
            name: torch.randn(b.shape, generator=generator, dtype=b.dtype, device=b.device) for name, b in noisy.items()
        }

    def inner_loss(self, w: Params, lam: Params, batch: Any) -> Tensor:
        """Training loss under noise; ``batch`` is ``(x, y)`` or ``(x, y, noise)``."""
        x, y, *given = batch
        buffers = _with_noise(self.model.buffers, given[0] if given else self.noise())
        return self.loss(self.model.with_buffers(merge(w, lam), buffers, x)[0], y)


_NOISE = ".inserted.noise"


def _with_noise(buffers: Params, noise: Params) -> Params:
    """Buffers with the noise put in.

    Raises:
        ValueError: if the noise does not fit.
    """
    wanted = {name for name in buffers if name.endswith(_NOISE)}
    if noise.keys() != wanted:
        raise ValueError(
            f"the batch's noise does not fit the model: it has {sorted(noise)}, the model needs {sorted(wanted)}; "
            "draw it with model.noise()"
        )
    return {**buffers, **noise}


class _Transform(nn.Module):
    """The transformation; ``noise`` (ε_γ, ε_β) is a buffer that the inner loss fills."""

    noise: Tensor

    def __init__(self, channels: int, gamma: float, beta: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), gamma))
        self.beta = nn.Parameter(torch.full((channels,), beta))
        self.register_buffer("noise", torch.zeros(2, channels))

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, *[1] * (x.ndim - 2))
        learned = torch.stack([self.gamma, self.beta])
        sizes = nn.functional.softplus(learned, beta=100)
        factor, shift = (self.noise * sizes).unbind(0)
        return (1 + factor.reshape(shape)) * x + shift.reshape(shape)
