"""Learned augmentation: training images are turned by one learned angle."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from metaopt.functional import Params, functional
from metaopt.models.base import Loss, MetaModel


@dataclass(frozen=True)
class Rotation(MetaModel):
    r"""All parameters of a module are weights.

    ``lam["angle"]`` is one angle in radians, positive anticlockwise.

    .. math::
        L(w, \lambda; (x, y)) = \ell\big(f(R_\lambda x;\, w),\, y\big), \qquad L_{val}(w; (x, y)) =
        \ell\big(f(x;\, w),\, y\big)

    The outer loss sees images as they are, so that there is no direct term: trained on upright
    digits and validated on turned ones, λ finds the angle. Bohdal et al. 2021 (EvoGrad), `arXiv
    2106.10575 <https://arxiv.org/abs/2106.10575>`__.

    Args:
        model: the wrapped module, of images ``[n, channels, height, width]``; :meth:`of` wraps a
            plain one.
        loss: ``(prediction, target) -> scalar``.
        degrees: the initial angle.

    >>> module = nn.Sequential(nn.Flatten(), nn.Linear(25, 2))
    >>> rotation = Rotation.of(module, nn.functional.cross_entropy, degrees=90)
    >>> w, lam = rotation.init()
    >>> round(float(lam["angle"]), 4)
    1.5708
    >>> rotation.inner_loss(w, lam, (torch.ones(3, 1, 5, 5), torch.tensor([0, 1, 0]))).shape
    torch.Size([])
    """

    degrees: float = 0.0

    @classmethod
    def of(cls, module: nn.Module, loss: Loss, *, degrees: float = 0.0) -> Rotation:
        """A learned rotation before your own module."""
        return cls(functional(module), loss, degrees)

    def init(self) -> tuple[Params, Params]:
        """``(w, lam)``: the module's own initial values, and the initial angle."""
        like = next(iter(self.model.params.values()))
        return self.model.params, {
            "angle": torch.tensor(math.radians(self.degrees), dtype=like.dtype, device=like.device)
        }

    def predict(self, w: Params, lam: Params, x: Tensor) -> Tensor:
        """The output for images as they are."""
        return self.model(w, x)

    def inner_loss(self, w: Params, lam: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Training loss on turned images."""
        x, y = batch
        return self.loss(self.model(w, rotate(x, lam["angle"])), y)


def rotate(images: Tensor, angle: Tensor) -> Tensor:
    """Images turned anticlockwise about their centre, bilinear, black outside.

    All images share the angle, so that each output pixel is a sum of four input pixels with weights
    that depend on the angle alone. Unlike ``grid_sample`` this can be differentiated any number of
    times, in forward mode too.

    Args:
        images: ``[n, channels, height, width]``.
        angle: a scalar, in radians.

    Raises:
        ValueError: if the images have another shape.

    >>> rotate(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), torch.tensor(math.pi / 2)).round(decimals=3)
    tensor([[[[2., 4.], [1., 3.]]]])
    """
    if images.ndim != 4:
        raise ValueError(f"images are [n, channels, height, width], got shape {tuple(images.shape)}")
    height, width = images.shape[-2:]
    y = torch.arange(height, dtype=images.dtype, device=images.device).unsqueeze(1) - (height - 1) / 2
    x = torch.arange(width, dtype=images.dtype, device=images.device) - (width - 1) / 2
    cos = angle.cos()
    sin = angle.sin()
    row = sin * x + cos * y + (height - 1) / 2
    column = cos * x - sin * y + (width - 1) / 2
    top = row.detach().floor()
    left = column.detach().floor()
    below = row - top
    right = column - left
    flat = images.flatten(2)
    out = torch.zeros_like(images)
    for down, share_down in ((0, 1 - below), (1, below)):
        for across, share_across in ((0, 1 - right), (1, right)):
            i = (top + down).long()
            j = (left + across).long()
            inside = (i >= 0) & (i < height) & (j >= 0) & (j < width)
            pixel = (i.clamp(0, height - 1) * width + j.clamp(0, width - 1)).flatten()
            out = out + flat[:, :, pixel].unflatten(2, (height, width)) * (share_down * share_across * inside)
    return out
