"""metaopt: one bilevel problem, every hypergradient estimator, each checked against an exact answer."""

from metaopt import inner, linsolve, meta, models, tasks, trajectory, tree
from metaopt.estimators import (
    IFT,
    RMD,
    Cost,
    DrMAD,
    Estimator,
    FinishedRun,
    FirstOrder,
    HyperDistill,
    Hypergradient,
    OneStep,
    OuterObjective,
    Response,
    Terms,
    TruncatedRMD,
    UndeclaredTensorWarning,
    UnusedHyperparameterWarning,
    ZeroHypergradientWarning,
    hypergradient,
    unroll,
)
from metaopt.functional import FunctionalModel, functional, merge, partition
from metaopt.inner import InnerState, custom_step, inner_step
from metaopt.meta import online

__version__ = "0.1.0"

__all__ = [
    "IFT",
    "RMD",
    "Cost",
    "DrMAD",
    "Estimator",
    "FinishedRun",
    "FirstOrder",
    "FunctionalModel",
    "HyperDistill",
    "Hypergradient",
    "InnerState",
    "OneStep",
    "OuterObjective",
    "Response",
    "Terms",
    "TruncatedRMD",
    "UndeclaredTensorWarning",
    "UnusedHyperparameterWarning",
    "ZeroHypergradientWarning",
    "custom_step",
    "functional",
    "hypergradient",
    "inner",
    "inner_step",
    "linsolve",
    "merge",
    "meta",
    "models",
    "online",
    "partition",
    "tasks",
    "trajectory",
    "tree",
    "unroll",
]
