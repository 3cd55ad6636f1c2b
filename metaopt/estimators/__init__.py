"""Hypergradient estimators: one linear map, many ways to it."""

from metaopt.estimators.base import (
    Estimator,
    FinishedRun,
    Hypergradient,
    OuterObjective,
    Response,
    Terms,
    UnusedHyperparameterWarning,
    ZeroHypergradientWarning,
    hypergradient,
)
from metaopt.estimators.cost import Cost
from metaopt.estimators.first_order import FirstOrder
from metaopt.estimators.hyperdistill import HyperDistill
from metaopt.estimators.implicit import IFT
from metaopt.estimators.reverse import RMD, DrMAD, OneStep, TruncatedRMD
from metaopt.estimators.unroll import UndeclaredTensorWarning, unroll

__all__ = [
    "IFT",
    "RMD",
    "Cost",
    "DrMAD",
    "Estimator",
    "FinishedRun",
    "FirstOrder",
    "HyperDistill",
    "Hypergradient",
    "OneStep",
    "OuterObjective",
    "Response",
    "Terms",
    "TruncatedRMD",
    "UndeclaredTensorWarning",
    "UnusedHyperparameterWarning",
    "ZeroHypergradientWarning",
    "hypergradient",
    "unroll",
]
