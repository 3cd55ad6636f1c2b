"""SciPy's iterative solvers on our operators: products are ours, the iteration is theirs, in float64 on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator

from metaopt import tree
from metaopt.linsolve.base import Operator, Solution, relative_residual
from metaopt.tree import Tree


def solve(method: Callable[..., Any], operator: Operator, alpha: Tree) -> Solution:
    """``method(A, b) -> (x, info)`` with ``A v = v K`` and ``b = alpha``, and the measured residual."""
    right = tree.vector(alpha)
    products = 0

    def matvec(v: Any) -> Any:
        nonlocal products
        products += 1
        given = torch.as_tensor(np.asarray(v).reshape(-1)).to(right.device, right.dtype)
        return tree.vector(operator(tree.unvector(given, alpha))).detach().cpu().double().numpy()

    n = right.numel()
    A = LinearOperator((n, n), matvec=matvec, dtype=np.float64)  # pyright: ignore[reportCallIssue]
    found, _ = method(A, right.detach().cpu().double().numpy())
    x = tree.unvector(torch.as_tensor(found).to(right.device, right.dtype), alpha)
    return Solution(x, relative_residual(operator, x, alpha), products + 1)
