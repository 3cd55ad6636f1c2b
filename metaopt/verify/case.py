"""A problem whose hypergradient is known, and the random quadratics that such problems are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metaopt.problem import Problem
from metaopt.tree import Tree


@dataclass(frozen=True, repr=False)
class Case(Problem):
    """A bilevel problem, and what is known about it.

    Attributes:
        exact: horizon T to the exact hypergradient, a pytree like λ, where a closed form is known.
        constant_jacobians: whether A and B are the same at every state, so that DrMAD is exact.
        converged: whether ``w0`` minimises the inner loss already.
        contraction: γ for which HyperDistill with θ = 1 is exact at every horizon, if there is one.
        evograd_limit: horizon T to EvoGrad's limit for many copies (Gaussian, σ = 1, τ = ½), if known.
    """

    _: KW_ONLY
    exact: Callable[[int], Tree] | None = None
    constant_jacobians: bool = False
    converged: bool = False
    contraction: float | None = None
    evograd_limit: Callable[[int], Tree] | None = None


class Quadratic(NamedTuple):
    """The random parts of a quadratic problem, float64."""

    H: Tensor
    w0: Tensor
    lam: Tensor
    target: Tensor


def draw_quadratic(size: int, conditioning: float, seed: int, *, diagonal: bool = False) -> Quadratic:
    """A symmetric positive H with eigenvalues spread over ``[1/conditioning, 1]``, and random vectors."""
    if size < 1 or conditioning < 1:
        raise ValueError(f"size and conditioning must be at least 1, got size={size}, conditioning={conditioning}")
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    decades = torch.log10(torch.tensor(conditioning)).item()
    eigenvalues = torch.logspace(0, -decades, size, dtype=torch.float64)
    basis = identity(size) if diagonal else torch.linalg.qr(normal(size, size)).Q
    H = basis @ torch.diag(eigenvalues) @ basis.T
    return Quadratic(H, w0=normal(size), lam=normal(size), target=normal(size))


def identity(size: int) -> Tensor:
    """The identity matrix in float64."""
    return torch.eye(size, dtype=torch.float64)
