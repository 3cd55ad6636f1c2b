r"""Batch normalisation with batch statistics, and a second derivative of two buffers and a dozen passes.

.. math::
    y = \gamma \hat x + \beta, \qquad \hat x = s\,(x - \mu), \qquad s = (\mathrm{var}(x) +
    \epsilon)^{-1/2}

With :math:`E` the mean over all examples and places of a channel and g the cotangent of y, the
first derivative is

.. math::
    \bar x = \gamma s\,(g - E g - \hat x\, E[g \hat x]), \qquad \bar\gamma = M\, E[g \hat x],
    \qquad \bar\beta = M\, E g.

The second derivative takes a cotangent u of :math:`\bar x`, and is a sum of g, x and u, each times
one number per channel. Torch's own formula for it takes some fifty passes and seven buffers, more
than everything else in the second derivative of a small conv net. Its third derivative is wrong,
since it takes μ and s for constants. Here the third and all further ones come from plain operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metaopt.layers import statistics
from metaopt.layers.eager import eager, followed, plain, transformed

TYPES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def forward(layer: Any, input: Tensor) -> Tensor:
    """A batch norm layer's forward pass, the same numbers as torch's.

    Its running statistics are tensors, ``None``, or idle (see :mod:`metaopt.layers.statistics`).
    """
    mean = layer.running_mean
    if not isinstance(mean, Tensor):
        return _by_batch(layer, input)
    if not layer.training:
        layer._check_input_dim(input)
        if followed(mean, layer.running_var):
            return statistics.normalised(layer, input)
        return type(layer).forward(layer, input)
    if not layer.track_running_stats:
        return _by_batch(layer, input)
    if not followed(input, mean, layer.running_var):
        return type(layer).forward(layer, input)

    y = _by_batch(layer, input)
    _move(layer, input)
    return y


def _by_batch(layer: Any, input: Tensor) -> Tensor:
    layer._check_input_dim(input)
    weight = layer.weight
    bias = layer.bias
    if weight is None or bias is None or not _lean(input, weight, bias):
        return nn.functional.batch_norm(input, None, None, weight, bias, True, 0.0, layer.eps)
    return _Normalised.apply(input, weight, bias, layer.eps)


def _move(layer: Any, x: Tensor) -> None:
    momentum = layer.momentum
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked = layer.num_batches_tracked + 1
        if momentum is None:  # the plain average of all batches
            momentum = 1.0 / layer.num_batches_tracked
    over = [axis for axis in range(x.ndim) if axis != 1]
    statistics.move(layer, x.mean(over), x.var(over), 0.0 if momentum is None else momentum)


def _lean(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Eager reverse mode on plain tensors, with more than one value per channel and one dtype."""
    return (
        x.ndim >= 2
        and x.numel() > x.shape[1]
        and x.dtype == weight.dtype
        and plain(x, weight, bias)
        and eager()
        and not torch.is_autocast_enabled(x.device.type)
    )


class _Normalised(torch.autograd.Function):
    """The forward pass ``(x, γ, β) -> y``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, mean, scale = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        if transformed(*cotangents):
            return (*_composed(cotangents[0], x, weight, ctx.eps), None)
        return (*_Backward.apply(cotangents[0], x, weight, mean, scale, ctx.eps), None)


class _Backward(torch.autograd.Function):
    """The backward pass ``(g, x, γ) -> (x̄, γ̄, β̄)``.

    The mean and the scale are given as numbers, and differentiated as functions of x.
    """

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        out = torch.ops.aten.native_batch_norm_backward(
            g, x, weight, None, None, mean, scale, True, eps, [True, True, True]
        )
        ctx.save_for_backward(g, x, weight, mean, scale, out[1], out[2])
        ctx.set_materialize_grads(False)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        g, x, weight, mean, scale, weight_bar, bias_bar = ctx.saved_tensors
        u, weight_u, bias_u = cotangents
        if torch.is_grad_enabled() or transformed(
            *cotangents
        ):  # once more to be differentiated, or many cotangents at once
            return (*_through_composed(g, x, weight, cotangents, ctx.eps), None, None, None)

        over = [axis for axis in range(x.ndim) if axis != 1]
        count = x.numel() // x.shape[1]
        # per channel: E g, E[g x̂], E u, E[u x̂], E[u g], all in the shape (1, C, 1, …)
        s, gamma, g_mean, g_x = (_channels(c, x) for c in (scale, weight, bias_bar / count, weight_bar / count))
        v = torch.zeros_like(s) if weight_u is None else _channels(weight_u, x)
        at = x - _channels(mean, x)
        if u is None:
            u_mean = u_x = covariance = torch.zeros_like(s)
            x_bar = torch.zeros_like(x)
        else:
            x_bar = u * at
            u_mean = u.mean(over, keepdim=True)
            u_x = s * x_bar.mean(over, keepdim=True)
            covariance = torch.mul(u, g, out=x_bar).mean(over, keepdim=True) - u_mean * g_mean - u_x * g_x
        a = gamma * s
        of_g = v - a * u_x
        torch.mul(g, s * of_g, out=x_bar)
        x_bar.addcmul_(at, -s * s * ((of_g - a * u_x) * g_x + a * covariance))
        x_bar.add_(s * (a * g_x * u_mean - of_g * g_mean))
        g_bar = at.mul_(s * of_g).add_((0 if bias_u is None else _channels(bias_u, x)) - a * u_mean)
        if u is not None:
            x_bar.addcmul_(u, -s * a * g_x)
            g_bar.addcmul_(u, a)
        return g_bar, x_bar, (count * s * covariance).view_as(weight), None, None, None


def _channels(values: Tensor, like: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (like.ndim - 2))


def _through_composed(
    g: Tensor, x: Tensor, weight: Tensor, cotangents: tuple[Tensor | None, ...], eps: float
) -> tuple[Tensor, ...]:
    """The pullback of :func:`_composed` by autograd, itself differentiable."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # as fresh nodes, since g may depend on x and γ, and that path is not of this pullback
        g, x, weight = (
            at.view_as(at) if again and at.requires_grad else at.detach().requires_grad_() for at in (g, x, weight)
        )
        pairs = [(out, c) for out, c in zip(_composed(g, x, weight, eps), cotangents, strict=True) if c is not None]
        outs, seeds = zip(*pairs, strict=True)
        return torch.autograd.grad(outs, (g, x, weight), seeds, create_graph=again, materialize_grads=True)


def _composed(g: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``(x̄, γ̄, β̄)`` from plain operations."""
    over = [axis for axis in range(x.ndim) if axis != 1]
    at = x - x.mean(over, keepdim=True)
    variance = at.pow(2).mean(over, keepdim=True)
    s = (variance + eps).rsqrt()
    x_hat = at * s

    along = g * x_hat
    g_x = along.mean(over, keepdim=True)
    g_1 = g.mean(over, keepdim=True)
    x_bar = _channels(weight, x) * s * (g - g_1 - x_hat * g_x)
    return x_bar, along.sum(over), g.sum(over)
