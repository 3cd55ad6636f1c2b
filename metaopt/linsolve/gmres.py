"""Generalised minimum residuals, for a K of any kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import scipy
from typing_extensions import override

from metaopt.linsolve._scipy import SciPySolver


@dataclass(frozen=True)
class GMRES(SciPySolver):
    r"""SciPy's ``gmres``, without restarts: for a custom Φ, whose ``I - A`` is not symmetric.

    .. math:: x_k = \arg\min_{x \in \mathcal{K}_k(K, \alpha)} \|\alpha - xK\|

    Saad & Schultz 1986; for hypergradients of fixed points Blondel et al. 2022, `arXiv 2105.15183
    <https://arxiv.org/abs/2105.15183>`__.

    Cost: ``iterations`` products and one for the residual. Memory: as many vectors, on the CPU in
    float64. Not linear in ``alpha`` before it has converged.

    Args:
        iterations: the most that are taken.
        tolerance: SciPy's ``rtol``.
        damping: added to the diagonal of K.

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 0.5 * ((w - lam) ** 2).sum(), mo.optim.SGD(lr=0.5))
    >>> problem = mo.Problem(step, lambda w, lam, _: w.sum(), torch.zeros(1), torch.ones(1), [None] * 30)
    >>> problem.hypergradient(mo.IFT(mo.linsolve.GMRES())).total  # dw*/dλ = 1
    tensor([1.])
    """

    @override
    def run(self, A: scipy.sparse.linalg.LinearOperator, b: Any) -> Any:
        return scipy.sparse.linalg.gmres(A, b, rtol=self.tolerance, restart=self.iterations, maxiter=1)
