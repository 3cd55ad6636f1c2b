"""The tables that everything joins: a new estimator, optimiser, trajectory or solver is one row here, and every test sees it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import metaopt as mo
from metaopt.estimators import Estimator
from metaopt.linsolve import Solver
from metaopt.optim import Optimizer
from metaopt.trajectory import Trajectory


class EstimatorCase(NamedTuple):
    """``make(T)`` builds the estimator for a run of T steps; ``full`` says that it then equals the exact gradient on any problem."""

    name: str
    make: Callable[[int], Estimator]
    full: bool = False


class OptimizerCase(NamedTuple):
    """``make()`` is ours; ``torch`` makes the same one of torch.optim over given parameters (``None``: torch has none).

    ``plain`` says that it takes weights of any shape and name, and that each of its steps responds
    smoothly to the gradient (the sign methods do not, nor accumulation between its updates).
    """

    name: str
    make: Callable[[], Optimizer]
    torch: Callable[[list[torch.Tensor]], torch.optim.Optimizer] | None
    plain: bool = True


class TrajectoryCase(NamedTuple):
    """A trajectory for RMD; ``full``: goes back to the start of the run, exactly."""

    name: str
    make: Callable[[int], Trajectory]
    full: bool


class SolverCase(NamedTuple):
    """A linear solver; ``tolerance`` is what it reaches on a well-conditioned system of size ≤ 8 with eigenvalues in [0.5, 1.5]."""

    name: str
    make: Callable[[], Solver]
    tolerance: float


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

TRAJECTORIES: list[TrajectoryCase] = [
    TrajectoryCase("Full", lambda T: mo.trajectory.Full(), full=True),
    TrajectoryCase("Last", lambda T: mo.trajectory.Last(T), full=True),
    TrajectoryCase("Last, graphs", lambda T: mo.trajectory.Last(T, graphs=True), full=True),
    TrajectoryCase("Graphs", lambda T: mo.trajectory.Graphs(), full=True),
    TrajectoryCase("Checkpointed", lambda T: mo.trajectory.Checkpointed(slots=2), full=True),
    TrajectoryCase("Checkpointed, horizon", lambda T: mo.trajectory.Checkpointed(slots=3, horizon=T), full=True),
    TrajectoryCase("Checkpointed, every", lambda T: mo.trajectory.Checkpointed(every=3), full=True),
    TrajectoryCase("Checkpointed, sqrt", lambda T: mo.trajectory.Checkpointed("sqrt"), full=True),
    TrajectoryCase("Offloaded", lambda T: mo.trajectory.Offloaded(device="cpu"), full=True),
    TrajectoryCase(
        "Offloaded, checkpointed on disk",
        lambda T: mo.trajectory.Offloaded(directory=tempfile.gettempdir(), of=mo.trajectory.Checkpointed(slots=3)),
        full=True,
    ),
    TrajectoryCase("Budgeted, everything fits", lambda T: mo.trajectory.Budgeted(1 << 30), full=True),
    TrajectoryCase("Budgeted, some graphs", lambda T: mo.trajectory.Budgeted(2000), full=True),
    TrajectoryCase("Budgeted, checkpoints", lambda T: mo.trajectory.Budgeted(200), full=True),
    TrajectoryCase("Checked", lambda T: mo.trajectory.Checked(mo.trajectory.Checkpointed(slots=3)), full=True),
    TrajectoryCase("Reversible", lambda T: mo.trajectory.Reversible(), full=False),
    TrajectoryCase("Interpolated", lambda T: mo.trajectory.Interpolated(), full=False),
]

SOLVERS: list[SolverCase] = [
    SolverCase("Neumann", lambda: mo.linsolve.Neumann(60, rate=1.0), 1e-10),
    SolverCase("Neumann, estimated rate", lambda: mo.linsolve.Neumann(200, rate=mo.linsolve.PowerIteration()), 1e-10),
    SolverCase("ConjugateGradient", lambda: mo.linsolve.ConjugateGradient(16, tolerance=1e-13), 1e-10),
    SolverCase("MINRES", lambda: mo.linsolve.MINRES(tolerance=1e-13), 1e-10),
    SolverCase("GMRES", lambda: mo.linsolve.GMRES(tolerance=1e-13), 1e-10),
    SolverCase("Nystrom", lambda: mo.linsolve.Nystrom(rank=8, damping=1e-6), 1e-5),
    SolverCase("Exact", lambda: mo.linsolve.Exact(), 1e-12),
    SolverCase("Identity", lambda: mo.linsolve.Identity(), 2.0),
]

OPTIMIZERS: list[OptimizerCase] = [
    OptimizerCase("SGD", lambda: mo.optim.SGD(lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    OptimizerCase(
        "SGD, momentum", lambda: mo.optim.SGD(lr=0.1, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)
    ),
    OptimizerCase(
        "SGD, Nesterov, weight decay",
        lambda: mo.optim.SGD(lr=0.1, momentum=0.9, weight_decay=0.05, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.05, nesterov=True),
    ),
    OptimizerCase(
        "SGD, dampening",
        lambda: mo.optim.SGD(lr=0.1, momentum=0.8, dampening=0.3),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, dampening=0.3),
    ),
    OptimizerCase("Adam", lambda: mo.optim.Adam(lr=0.05), lambda p: torch.optim.Adam(p, lr=0.05)),
    OptimizerCase(
        "Adam, AMSGrad, weight decay",
        lambda: mo.optim.Adam(lr=0.05, betas=(0.8, 0.9), weight_decay=0.1, amsgrad=True),
        lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.8, 0.9), weight_decay=0.1, amsgrad=True),
    ),
    OptimizerCase(
        "AdamW",
        lambda: mo.optim.AdamW(lr=0.05, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    ),
    OptimizerCase(
        "NAdam",
        lambda: mo.optim.NAdam(lr=0.05, weight_decay=0.1),
        lambda p: torch.optim.NAdam(p, lr=0.05, weight_decay=0.1),
    ),
    OptimizerCase(
        "NAdam, decoupled",
        lambda: mo.optim.NAdam(lr=0.05, weight_decay=0.1, momentum_decay=0.1, decoupled_weight_decay=True),
        lambda p: torch.optim.NAdam(p, lr=0.05, weight_decay=0.1, momentum_decay=0.1, decoupled_weight_decay=True),
    ),
    OptimizerCase(
        "RAdam",
        lambda: mo.optim.RAdam(lr=0.05, weight_decay=0.1),
        lambda p: torch.optim.RAdam(p, lr=0.05, weight_decay=0.1),
    ),
    OptimizerCase(
        "Adamax",
        lambda: mo.optim.Adamax(lr=0.05, weight_decay=0.1),
        lambda p: torch.optim.Adamax(p, lr=0.05, weight_decay=0.1),
    ),
    OptimizerCase("RMSprop", lambda: mo.optim.RMSprop(lr=0.02), lambda p: torch.optim.RMSprop(p, lr=0.02)),
    OptimizerCase(
        "RMSprop, centred, momentum",
        lambda: mo.optim.RMSprop(lr=0.02, alpha=0.9, weight_decay=0.1, momentum=0.5, centered=True),
        lambda p: torch.optim.RMSprop(p, lr=0.02, alpha=0.9, weight_decay=0.1, momentum=0.5, centered=True),
    ),
    OptimizerCase(
        "Adagrad",
        lambda: mo.optim.Adagrad(lr=0.1, lr_decay=0.1, weight_decay=0.1, initial_accumulator_value=0.1),
        lambda p: torch.optim.Adagrad(p, lr=0.1, lr_decay=0.1, weight_decay=0.1, initial_accumulator_value=0.1),
    ),
    OptimizerCase(
        "Adadelta", lambda: mo.optim.Adadelta(weight_decay=0.1), lambda p: torch.optim.Adadelta(p, weight_decay=0.1)
    ),
    OptimizerCase(
        "ASGD",
        lambda: mo.optim.ASGD(lr=0.1, lambd=0.1, t0=10.0, weight_decay=0.1),
        lambda p: torch.optim.ASGD(p, lr=0.1, lambd=0.1, t0=10.0, weight_decay=0.1),
    ),
    OptimizerCase("Rprop", lambda: mo.optim.Rprop(lr=0.05), lambda p: torch.optim.Rprop(p, lr=0.05), plain=False),
    OptimizerCase("Lion", lambda: mo.optim.Lion(lr=0.05, weight_decay=0.1), None, plain=False),
    OptimizerCase(
        "Adafactor",
        lambda: mo.optim.Adafactor(lr=0.05, weight_decay=0.1),
        lambda p: torch.optim.Adafactor(p, lr=0.05, weight_decay=0.1),
    ),
    OptimizerCase(
        "Muon",  # for matrices; the rest goes to SGD
        lambda: mo.optim.Groups(
            [(["a", "*weight"], mo.optim.Muon(lr=0.05, dtype=None)), (["*"], mo.optim.SGD(lr=0.1))]
        ),
        None,
        plain=False,
    ),
    OptimizerCase(
        "Maximise",
        lambda: mo.optim.Maximise(mo.optim.Adam(lr=0.01)),
        lambda p: torch.optim.Adam(p, lr=0.01, maximize=True),
    ),
    OptimizerCase("ClipValue", lambda: mo.optim.ClipValue(mo.optim.SGD(lr=0.1), limit=0.3), None),
    OptimizerCase("ClipNorm", lambda: mo.optim.ClipNorm(mo.optim.SGD(lr=0.1, momentum=0.9), max_norm=0.5), None),
    OptimizerCase("Accumulate", lambda: mo.optim.Accumulate(mo.optim.Adam(lr=0.05), every=2), None, plain=False),
    OptimizerCase("EMA", lambda: mo.optim.EMA(mo.optim.SGD(lr=0.1), decay=0.9), None),
    OptimizerCase(
        "Groups",
        lambda: mo.optim.Groups([(["b", "*bias"], mo.optim.SGD(lr=0.1)), (["*"], mo.optim.Adam(lr=0.05))]),
        None,
        plain=False,
    ),
    OptimizerCase(
        "Frozen",
        lambda: mo.optim.Groups([(["b", "*bias"], mo.optim.SGD(lr=0.1)), (["*"], mo.optim.Frozen())]),
        None,
        plain=False,
    ),
    OptimizerCase(
        "Precondition",
        lambda: mo.optim.Precondition(mo.optim.SGD(lr=0.1), lambda g, lam, t: mo.tree.map(torch.tanh, g)),
        None,
    ),
]

PLAIN_OPTIMIZERS = [case for case in OPTIMIZERS if case.plain]


def ids(table: list[Any]) -> list[str]:
    """Names for ``pytest.mark.parametrize``."""
    return [case.name for case in table]


def check_under_transforms(loss, x):
    """``loss`` has one gradient at x, whatever takes it: autograd, torch.func, forward mode, vmap."""
    tangent, at = torch.randn_like(x), x.clone().requires_grad_()
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
