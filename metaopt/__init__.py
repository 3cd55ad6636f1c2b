"""metaopt: one bilevel problem, every hypergradient estimator, each checked against an exact answer."""

import importlib
from typing import TYPE_CHECKING, Any

from metaopt import diagnose, inner, linsolve, meta, models, optim, trajectory, tree, verify
from metaopt.estimators import (
    BOME,
    DARTS,
    F2SA,
    FDS,
    FMD,
    IFT,
    NRES,
    PES,
    RMD,
    SAMA,
    SOBA,
    UORO,
    AntitheticES,
    CompiledLoss,
    Cost,
    DrMAD,
    Estimator,
    EvoGrad,
    FirstOrder,
    ForwardGradient,
    HyperDistill,
    Hypergradient,
    NotConvergedWarning,
    OneStep,
    OuterObjective,
    Response,
    TruncatedES,
    TruncatedRMD,
    UnusedHyperparameterWarning,
    ZeroHypergradientWarning,
    compiled,
    cycle,
    hypergradient,
    unroll,
)
from metaopt.functional import FunctionalModel, WithBuffers, functional, merge, partition
from metaopt.inner import (
    InnerState,
    Stacked,
    UndeclaredTensorWarning,
    UnreachedWeightWarning,
    custom_step,
    inner_step,
    inner_step_with_buffers,
    looped,
    replicated,
    vmapped,
)
from metaopt.meta import History, evaluate, online, progress, tune
from metaopt.optim import by
from metaopt.problem import Problem

if TYPE_CHECKING:
    from metaopt import interop, tasks

__version__ = "0.1.0"

_ON_DEMAND = ("interop", "tasks")  # rooms that bring other libraries with them


def __getattr__(name: str) -> Any:
    if name in _ON_DEMAND:
        return importlib.import_module(f"metaopt.{name}")
    raise AttributeError(f"module 'metaopt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


__all__ = [
    "BOME",
    "DARTS",
    "F2SA",
    "FDS",
    "FMD",
    "IFT",
    "NRES",
    "PES",
    "RMD",
    "SAMA",
    "SOBA",
    "UORO",
    "AntitheticES",
    "CompiledLoss",
    "Cost",
    "DrMAD",
    "Estimator",
    "EvoGrad",
    "FirstOrder",
    "ForwardGradient",
    "FunctionalModel",
    "History",
    "HyperDistill",
    "Hypergradient",
    "InnerState",
    "NotConvergedWarning",
    "OneStep",
    "OuterObjective",
    "Problem",
    "Response",
    "Stacked",
    "TruncatedES",
    "TruncatedRMD",
    "UndeclaredTensorWarning",
    "UnreachedWeightWarning",
    "UnusedHyperparameterWarning",
    "WithBuffers",
    "ZeroHypergradientWarning",
    "by",
    "compiled",
    "custom_step",
    "cycle",
    "diagnose",
    "evaluate",
    "functional",
    "hypergradient",
    "inner",
    "inner_step",
    "inner_step_with_buffers",
    "interop",
    "linsolve",
    "looped",
    "merge",
    "meta",
    "models",
    "online",
    "optim",
    "partition",
    "progress",
    "replicated",
    "tasks",
    "trajectory",
    "tree",
    "tune",
    "unroll",
    "verify",
    "vmapped",
]
