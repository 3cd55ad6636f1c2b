"""Operations whose derivative exists everywhere, for second moments that start at zero."""

from __future__ import annotations

import torch
from torch import Tensor


def sqrt(x: Tensor) -> Tensor:
    r""":math:`\sqrt{x}` with derivative 0 where :math:`x \le 0` (its value there is 0).

    The true derivative is infinite at 0; multiplied by the zero derivative of ``g²`` it makes NaN.
    At ``g = 0`` with nothing accumulated, 0 is the derivative of :math:`\sqrt{g^2} = |g|` in the
    middle of its subdifferential [-1, 1].

    >>> x = torch.tensor([0.0, 4.0], requires_grad=True)
    >>> torch.autograd.grad(sqrt(x).sum(), x)[0]
    tensor([0.0000, 0.2500])
    """
    positive = x > 0
    at = torch.where(positive, x, 1.0)  # the derivative of what is not taken must be finite, too
    return torch.where(positive, at.sqrt(), 0.0)


def like(value: float | Tensor, x: Tensor) -> Tensor:
    """A hyperparameter as a tensor of the dtype and device of ``x``."""
    if isinstance(value, Tensor):
        return value
    return torch.as_tensor(value, dtype=x.dtype, device=x.device)


def with_eps(x: Tensor, eps: float | Tensor) -> Tensor:
    """``x + ε`` with an ε that is not rounded to zero, so that 0 / (0 + ε) is 0 in float16 too.

    >>> with_eps(torch.zeros(1, dtype=torch.float16), 1e-8).item() > 0
    True
    """
    if isinstance(eps, Tensor) or eps == 0:
        return x + eps
    numbers = torch.finfo(x.dtype)
    smallest = numbers.smallest_normal * numbers.eps
    return x + max(eps, smallest)
