"""What there is to verify: one row per trajectory, optimiser and solver.

``metaopt verify`` and the tests both read these tables. A public class without a row fails both.
The rows of estimators are their formulas (:data:`metaopt.verify.formulas.ENTRIES`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import NamedTuple

import torch

from metaopt import linsolve, optim, trajectory, tree
from metaopt.linsolve import Solver
from metaopt.optim import Optimizer
from metaopt.trajectory import Trajectory


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
    """A linear solver, and the ``tolerance`` it reaches at size ≤ 8 with eigenvalues in [0.5, 1.5]."""

    name: str
    make: Callable[[], Solver]
    tolerance: float


TRAJECTORIES: list[TrajectoryCase] = [
    TrajectoryCase("Full", lambda T: trajectory.Full(), full=True),
    TrajectoryCase("Last", lambda T: trajectory.Last(T), full=True),
    TrajectoryCase("Last, graphs", lambda T: trajectory.Last(T, graphs=True), full=True),
    TrajectoryCase("Graphs", lambda T: trajectory.Graphs(), full=True),
    TrajectoryCase("Checkpointed", lambda T: trajectory.Checkpointed(slots=2), full=True),
    TrajectoryCase("Checkpointed, horizon", lambda T: trajectory.Checkpointed(slots=3, horizon=T), full=True),
    TrajectoryCase("Checkpointed, every", lambda T: trajectory.Checkpointed(every=3), full=True),
    TrajectoryCase("Checkpointed, sqrt", lambda T: trajectory.Checkpointed("sqrt"), full=True),
    TrajectoryCase("Offloaded", lambda T: trajectory.Offloaded(device="cpu"), full=True),
    TrajectoryCase(
        "Offloaded, checkpointed on disk",
        lambda T: trajectory.Offloaded(directory=tempfile.gettempdir(), of=trajectory.Checkpointed(slots=3)),
        full=True,
    ),
    TrajectoryCase("Budgeted, everything fits", lambda T: trajectory.Budgeted(1 << 30), full=True),
    TrajectoryCase("Budgeted, some graphs", lambda T: trajectory.Budgeted(2000), full=True),
    TrajectoryCase("Budgeted, checkpoints", lambda T: trajectory.Budgeted(200), full=True),
    TrajectoryCase("Checked", lambda T: trajectory.Checked(trajectory.Checkpointed(slots=3)), full=True),
    TrajectoryCase("Reversible", lambda T: trajectory.Reversible(), full=False),
    TrajectoryCase("Interpolated", lambda T: trajectory.Interpolated(), full=False),
]

SOLVERS: list[SolverCase] = [
    SolverCase("Neumann", lambda: linsolve.Neumann(60, rate=1.0), 1e-10),
    SolverCase("Neumann, estimated rate", lambda: linsolve.Neumann(200, rate=linsolve.PowerIteration()), 1e-10),
    SolverCase("ConjugateGradient", lambda: linsolve.ConjugateGradient(16, tolerance=1e-13), 1e-10),
    SolverCase("MINRES", lambda: linsolve.MINRES(tolerance=1e-13), 1e-10),
    SolverCase("GMRES", lambda: linsolve.GMRES(tolerance=1e-13), 1e-10),
    SolverCase("Nystrom", lambda: linsolve.Nystrom(rank=8, damping=1e-6), 1e-5),
    SolverCase("Exact", lambda: linsolve.Exact(), 1e-12),
    SolverCase("Identity", lambda: linsolve.Identity(), 2.0),
]

OPTIMIZERS: list[OptimizerCase] = [
    OptimizerCase("SGD", lambda: optim.SGD(lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    OptimizerCase(
        "SGD, momentum", lambda: optim.SGD(lr=0.1, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)
    ),
    OptimizerCase(
        "SGD, Nesterov, weight decay",
        lambda: optim.SGD(lr=0.1, momentum=0.9, weight_decay=0.05, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.05, nesterov=True),
    ),
    OptimizerCase(
        "SGD, dampening",
        lambda: optim.SGD(lr=0.1, momentum=0.8, dampening=0.3),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, dampening=0.3),
    ),
    OptimizerCase("Adam", lambda: optim.Adam(lr=0.05), lambda p: torch.optim.Adam(p, lr=0.05)),
    OptimizerCase(
        "Adam, AMSGrad, weight decay",
        lambda: optim.Adam(lr=0.05, betas=(0.8, 0.9), weight_decay=0.1, amsgrad=True),
        lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.8, 0.9), weight_decay=0.1, amsgrad=True),
    ),
    OptimizerCase(
        "AdamW",
        lambda: optim.AdamW(lr=0.05, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    ),
    OptimizerCase(
        "NAdam",
        lambda: optim.NAdam(lr=0.05, weight_decay=0.1),
        lambda p: torch.optim.NAdam(p, lr=0.05, weight_decay=0.1),
    ),
    OptimizerCase(
        "NAdam, decoupled",
        lambda: optim.NAdam(lr=0.05, weight_decay=0.1, momentum_decay=0.1, decoupled_weight_decay=True),
        lambda p: torch.optim.NAdam(p, lr=0.05, weight_decay=0.1, momentum_decay=0.1, decoupled_weight_decay=True),
    ),
    OptimizerCase(
        "RAdam",
        lambda: optim.RAdam(lr=0.05, weight_decay=0.1),
        lambda p: torch.optim.RAdam(p, lr=0.05, weight_decay=0.1),
    ),
    OptimizerCase(
        "Adamax",
        lambda: optim.Adamax(lr=0.05, weight_decay=0.1),
        lambda p: torch.optim.Adamax(p, lr=0.05, weight_decay=0.1),
    ),
    OptimizerCase("RMSprop", lambda: optim.RMSprop(lr=0.02), lambda p: torch.optim.RMSprop(p, lr=0.02)),
    OptimizerCase(
        "RMSprop, centred, momentum",
        lambda: optim.RMSprop(lr=0.02, alpha=0.9, weight_decay=0.1, momentum=0.5, centered=True),
        lambda p: torch.optim.RMSprop(p, lr=0.02, alpha=0.9, weight_decay=0.1, momentum=0.5, centered=True),
    ),
    OptimizerCase(
        "Adagrad",
        lambda: optim.Adagrad(lr=0.1, lr_decay=0.1, weight_decay=0.1, initial_accumulator_value=0.1),
        lambda p: torch.optim.Adagrad(p, lr=0.1, lr_decay=0.1, weight_decay=0.1, initial_accumulator_value=0.1),
    ),
    OptimizerCase(
        "Adadelta", lambda: optim.Adadelta(weight_decay=0.1), lambda p: torch.optim.Adadelta(p, weight_decay=0.1)
    ),
    OptimizerCase(
        "ASGD",
        lambda: optim.ASGD(lr=0.1, lambd=0.1, t0=10.0, weight_decay=0.1),
        lambda p: torch.optim.ASGD(p, lr=0.1, lambd=0.1, t0=10.0, weight_decay=0.1),
    ),
    OptimizerCase("Rprop", lambda: optim.Rprop(lr=0.05), lambda p: torch.optim.Rprop(p, lr=0.05), plain=False),
    OptimizerCase("Lion", lambda: optim.Lion(lr=0.05, weight_decay=0.1), None, plain=False),
    OptimizerCase(
        "Adafactor",
        lambda: optim.Adafactor(lr=0.05, weight_decay=0.1),
        lambda p: torch.optim.Adafactor(p, lr=0.05, weight_decay=0.1),
    ),
    OptimizerCase(
        "Muon",  # for matrices; the rest goes to SGD
        lambda: optim.Groups([(["a", "*weight"], optim.Muon(lr=0.05, dtype=None)), (["*"], optim.SGD(lr=0.1))]),
        None,
        plain=False,
    ),
    OptimizerCase(
        "Maximise",
        lambda: optim.Maximise(optim.Adam(lr=0.01)),
        lambda p: torch.optim.Adam(p, lr=0.01, maximize=True),
    ),
    OptimizerCase("ClipValue", lambda: optim.ClipValue(optim.SGD(lr=0.1), limit=0.3), None),
    OptimizerCase("ClipNorm", lambda: optim.ClipNorm(optim.SGD(lr=0.1, momentum=0.9), max_norm=0.5), None),
    OptimizerCase("Accumulate", lambda: optim.Accumulate(optim.Adam(lr=0.05), every=2), None, plain=False),
    OptimizerCase("EMA", lambda: optim.EMA(optim.SGD(lr=0.1), decay=0.9), None),
    OptimizerCase(
        "Groups",
        lambda: optim.Groups([(["b", "*bias"], optim.SGD(lr=0.1)), (["*"], optim.Adam(lr=0.05))]),
        None,
        plain=False,
    ),
    OptimizerCase(
        "Frozen",
        lambda: optim.Groups([(["b", "*bias"], optim.SGD(lr=0.1)), (["*"], optim.Frozen())]),
        None,
        plain=False,
    ),
    OptimizerCase(
        "Precondition",
        lambda: optim.Precondition(optim.SGD(lr=0.1), lambda g, lam, t: tree.map(torch.tanh, g)),
        None,
    ),
]
