"""The tables that everything joins: estimators here; optimisers, trajectories and solvers in `metaopt.verify.tables`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import metaopt as mo
from metaopt.estimators import Estimator
from metaopt.verify.tables import OPTIMIZERS, SOLVERS, TRAJECTORIES


class EstimatorCase(NamedTuple):
    """``make(T)`` builds the estimator for a run of T steps; ``full`` says that it then equals the exact gradient on any problem."""

    name: str
    make: Callable[[int], Estimator]
    full: bool = False


ESTIMATORS: list[EstimatorCase] = [
    EstimatorCase("FirstOrder", lambda T: mo.FirstOrder()),
    EstimatorCase("OneStep", lambda T: mo.OneStep()),
    EstimatorCase("TruncatedRMD(T//2)", lambda T: mo.TruncatedRMD(T // 2)),
    EstimatorCase("TruncatedRMD(T)", lambda T: mo.TruncatedRMD(T), full=True),
    EstimatorCase("RMD", lambda T: mo.RMD(), full=True),
    EstimatorCase("FMD", lambda T: mo.FMD(), full=True),
    EstimatorCase("FDS", lambda T: mo.FDS(window=2)),
    EstimatorCase("DrMAD", lambda T: mo.DrMAD()),
    EstimatorCase("IFT", lambda T: mo.IFT(mo.linsolve.Neumann(5, rate=0.1), converged=None, solved=None)),
    EstimatorCase("HyperDistill", lambda T: mo.HyperDistill(gamma=0.9)),
    EstimatorCase("EvoGrad", lambda T: mo.EvoGrad()),
    EstimatorCase("PES", lambda T: mo.PES(window=2)),
    EstimatorCase("NRES", lambda T: mo.NRES()),
    EstimatorCase("AntitheticES", lambda T: mo.AntitheticES(pairs=2)),
    EstimatorCase("TruncatedES", lambda T: mo.TruncatedES(window=2)),
    EstimatorCase("ForwardGradient", lambda T: mo.ForwardGradient(directions=2)),
    EstimatorCase("UORO", lambda T: mo.UORO()),
    EstimatorCase("DARTS", lambda T: mo.DARTS()),
    EstimatorCase("SAMA", lambda T: mo.SAMA()),
    EstimatorCase("SOBA", lambda T: mo.SOBA(rate=0.1)),
    EstimatorCase("F2SA", lambda T: mo.F2SA(rate=0.1)),
    EstimatorCase("BOME", lambda T: mo.BOME(rate=0.1)),
]

__all__ = ["ESTIMATORS", "OPTIMIZERS", "PLAIN_OPTIMIZERS", "SOLVERS", "TRAJECTORIES"]
PLAIN_OPTIMIZERS = [case for case in OPTIMIZERS if case.plain]


def ids(table: list[Any]) -> list[str]:
    """Names for ``pytest.mark.parametrize``."""
    return [case.name for case in table]


def check_under_transforms(loss, x):
    """``loss`` has one gradient at x, whatever takes it: autograd, torch.func, forward mode, vmap."""
    tangent = torch.randn_like(x)
    at = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(at), at)
    assert torch.allclose(torch.func.grad(loss)(x), gradient)
    assert torch.allclose(torch.func.jvp(loss, (x,), (tangent,))[1], (gradient * tangent).sum())
    assert torch.allclose(torch.func.vmap(torch.func.grad(loss))(torch.stack([x, x]))[1], gradient)


class OnceDifferentiable(torch.autograd.Function):
    """``x ** 2``; autograd leaves its second derivative out of what else there is, without a word."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]
