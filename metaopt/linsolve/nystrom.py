"""A low-rank sketch of K, inverted by Woodbury's identity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaopt import checks, tree
from metaopt.linsolve.base import Operator, Solution, Solver, damped, relative_residual
from metaopt.tree import Tree


class Sketch(NamedTuple):
    """C [n, k], the pseudo-inverse of ``ρW + CᵀC`` [k, k], and how many solves have used it."""

    columns: Tensor
    core: Tensor
    uses: int = 0


@dataclass(frozen=True)
class Nystrom(Solver):
    r"""``x = alpha (K_k + ρI)^{-1}`` with ``K_k`` the rank-k Nyström approximation of a symmetric K.

    .. math::
        (C W^{-1} C^\top + \rho I)^{-1} = \tfrac1\rho I - \tfrac1\rho C\, (\rho W + C^\top C)^{-1} C^\top,
        \qquad C = K_{:,S},\; W = K_{S,S}

    with S a random set of k coordinates. Hataya & Yamada 2023, "Nyström method for accurate and
    scalable implicit differentiation", `arXiv 2302.09726 <https://arxiv.org/abs/2302.09726>`__.

    Cost: ``rank`` products for the sketch (none where one is reused) and one for the residual.
    Memory: ``rank`` vectors. Bias: ρ; what the sketch does not see is inverted as ``1/ρ``. Linear in
    ``alpha``. It has no learning rate, and cannot diverge.

    Args:
        rank: k; a rank of n gives ``(K + ρI)^{-1}``.
        damping: ρ > 0.
        uses: how many solves share a sketch (with ``IFT(warm_start=True)`` also across
            hyper-steps).
        seed: of the choice of coordinates.

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 0.5 * ((w - lam) ** 2).sum(), mo.optim.SGD(lr=0.5))
    >>> problem = mo.Problem(step, lambda w, lam, _: w.sum(), torch.zeros(1), torch.ones(1), [None] * 30)
    >>> problem.hypergradient(mo.IFT(mo.linsolve.Nystrom(2, damping=0.01))).total  # 1 / (1 + damping)
    tensor([0.9901])
    """

    rank: int = 10
    damping: float = 0.01
    uses: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        checks.count(self, "rank", self.rank)
        checks.positive(self, "damping", self.damping)
        checks.count(self, "uses", self.uses)

    def solve(self, operator: Operator, alpha: Tree, memory: Any = None) -> Solution:
        """Invert the sketch; the one in ``memory`` serves as long as ``uses`` allows."""
        n = tree.vector(alpha).numel()
        known = isinstance(memory, Sketch) and memory.uses < self.uses and len(memory.columns) == n
        sketch = memory if known else self.sketch(operator, alpha)
        sketching = 0 if known else sketch.columns.shape[1]
        x = self.apply(sketch, alpha)
        residual = relative_residual(damped(operator, self.damping), x, alpha)
        used = sketch._replace(uses=sketch.uses + 1)
        return Solution(x, residual, sketching + 1, used)

    def sketch(self, operator: Operator, like: Tree) -> Sketch:
        """Some columns of K, and the core of its inverse."""
        flat = tree.vector(like)
        n = flat.numel()
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(n, generator=generator)
        chosen = order[: self.rank].to(flat.device)

        columns = []
        for i in chosen:
            unit = torch.zeros_like(flat).index_fill(0, i, 1.0)
            column = operator(tree.unvector(unit, like))
            columns.append(tree.vector(column))

        C = torch.stack(columns, 1)
        W = C[chosen]
        core = self.damping * 0.5 * (W + W.T) + C.T @ C
        return Sketch(C, torch.linalg.pinv(core, hermitian=True))

    def apply(self, sketch: Sketch, alpha: Tree) -> Tree:
        """``alpha (K_k + ρI)^{-1}`` by Woodbury's identity."""
        flat = tree.vector(alpha)
        seen = sketch.columns @ (sketch.core @ (sketch.columns.T @ flat))
        return tree.unvector((flat - seen) / self.damping, alpha)
