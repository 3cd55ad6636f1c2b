"""SciPy's iterative solvers on our operators: products are ours, the iteration is theirs, in float64 on the CPU."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy
import torch
from typing_extensions import override

from metaopt import checks, tree
from metaopt.linsolve.base import Operator, Solution, Solver, damped, relative_residual
from metaopt.tree import Tree


@dataclass(frozen=True)
class SciPySolver(Solver):
    """What SciPy's Krylov methods share: their settings and the way there and back.

    Subclasses name the method.

    Args:
        iterations: the most that are taken.
        tolerance: SciPy's ``rtol``.
        damping: added to the diagonal of K.
    """

    iterations: int = 50
    tolerance: float = 1e-10
    damping: float = 0.0

    def __post_init__(self) -> None:
        checks.count(self, "iterations", self.iterations)
        checks.non_negative(self, "tolerance", self.tolerance)
        checks.non_negative(self, "damping", self.damping)

    @abstractmethod
    def run(self, A: scipy.sparse.linalg.LinearOperator, b: Any) -> Any:
        """SciPy's ``(x, info)`` for ``A x = b``."""

    @override
    def solve(self, operator: Operator, alpha: Tree, memory: Any = None) -> Solution:
        return _solve(self.run, damped(operator, self.damping), alpha)


def _solve(method: Callable[..., Any], operator: Operator, alpha: Tree) -> Solution:
    """``method(A, b) -> (x, info)`` with ``A v = v K`` and ``b = alpha``, and the measured residual."""
    products = 0

    def matvec(v: Any) -> Any:
        nonlocal products
        products += 1
        product = operator(_ours(np.asarray(v).reshape(-1), alpha))
        return _theirs(product)

    n = tree.vector(alpha).numel()
    A = scipy.sparse.linalg.LinearOperator((n, n), matvec=matvec, dtype=np.float64)  # pyright: ignore
    found, _ = method(A, _theirs(alpha))
    x = _ours(found, alpha)
    residual = relative_residual(operator, x, alpha)
    return Solution(x, residual, products + 1)


def _theirs(v: Tree) -> Any:
    """A pytree as SciPy's vector, in float64 on the CPU."""
    return tree.vector(v).detach().cpu().double().numpy()


def _ours(v: Any, like: Tree) -> Tree:
    """SciPy's vector as a pytree with the shapes, device and dtype of ``like``."""
    flat = tree.vector(like)
    return tree.unvector(torch.as_tensor(v).to(flat.device, flat.dtype), like)
