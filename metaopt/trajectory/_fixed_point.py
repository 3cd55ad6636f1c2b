r"""Momentum SGD in exact arithmetic: a run that can be undone to the bit.

Weights x and velocities v are integers, in units of :math:`2^{-52}`.

.. math:: v \leftarrow \beta v + g, \qquad x \leftarrow x - \text{round}(\eta v)

These updates can be undone exactly, except for the bits that multiplying by :math:`\beta < 1`
destroys. Those go into a buffer: with :math:`\beta = n/d`, the remainder of :math:`v / d` is pushed
in base d, and a remainder in base n is popped. A full buffer is put away as 48-bit numbers.

Maclaurin, Duvenaud and Adams 2015, `arXiv 1502.03492 <https://arxiv.org/abs/1502.03492>`__.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor

SCALE = 1 << 52
LARGEST_DENOMINATOR = 1 << 16
FULL = 1 << 47  # a buffer stays below this: one more remainder makes 47 + 16 = 63 bits
RANGE = float(1 << 9)


def ratio(momentum: float) -> tuple[int, int]:
    """The closest fraction with a denominator of at most 2^16: exact for 0.9 or 0.999.

    Raises:
        ValueError: unless it lies in (0, 1].
    """
    fraction = Fraction(momentum).limit_denominator(LARGEST_DENOMINATOR)
    if not 0 < fraction <= 1:
        raise ValueError(f"reversible learning needs a momentum in (0, 1], got {momentum}")
    return fraction.numerator, fraction.denominator


def to_fixed(x: Tensor, what: str) -> Tensor:
    """Integers in units of 2^-52.

    Raises:
        OverflowError: for numbers of 512 and more, and for those that are not finite.
    """
    if not bool((x.abs() < RANGE).all()):
        raise OverflowError(
            f"reversible learning: {what} left the range of fixed-point numbers (below {RANGE:.0f}); lower the "
            "learning rate"
        )
    return (x.double() * SCALE).round().long()


def to_float(fixed: Tensor, dtype: torch.dtype) -> Tensor:
    """The number that an integer stands for: a function of the integer alone."""
    return (fixed.double() / SCALE).to(dtype)


@dataclass
class Remainders:
    """The bits that multiplications by n/d destroyed, per weight: a stack.

    Attributes:
        buffer: the top of the stack, below ``FULL``.
        below: full buffers, as (low 32, high 16 bits).
    """

    buffer: Tensor
    below: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    fills: list[int] = field(default_factory=list)
    pushed: int = 0

    def multiply(self, v: Tensor, numerator: int, denominator: int) -> Tensor:
        """``v · n / d``, rounded.

        What is lost goes onto the stack, and a remainder in base n comes off it into the result.
        """
        if bool((self.buffer >= FULL * numerator // denominator - 1).any()):
            high = self.buffer >> 32
            low = self.buffer & 0xFFFFFFFF
            self.below.append(((low - (1 << 31)).to(torch.int32), high.to(torch.int16)))
            self.fills.append(self.pushed)
            self.buffer = torch.zeros_like(self.buffer)
            self.pushed = 0
        self.pushed += 1
        self.buffer = self.buffer * denominator + v.remainder(denominator)
        result = v.div(denominator, rounding_mode="floor") * numerator + self.buffer.remainder(numerator)
        self.buffer = self.buffer.div(numerator, rounding_mode="floor")
        return result

    def divide(self, v: Tensor, numerator: int, denominator: int) -> Tensor:
        """``v · d / n``: the inverse of :meth:`multiply`, to the bit."""
        if self.pushed == 0:
            low, high = self.below.pop()
            self.buffer = (high.long() << 32) + (low.long() + (1 << 31))
            self.pushed = self.fills.pop()
        self.pushed -= 1
        self.buffer = self.buffer * numerator + v.remainder(numerator)
        result = v.div(numerator, rounding_mode="floor") * denominator + self.buffer.remainder(denominator)
        self.buffer = self.buffer.div(denominator, rounding_mode="floor")
        return result

    def bits(self) -> float:
        """Bits per weight: 48 for each full buffer, and the largest number in the top one."""
        top = int(self.buffer.max()) if self.buffer.numel() else 0
        return 48.0 * len(self.below) + float(top.bit_length())
