"""Hypergradient estimators: one linear map, many ways to it."""

from metaopt.estimators.base import Estimator, Response
from metaopt.estimators.bome import BOME
from metaopt.estimators.compiled import CompiledLoss, compiled
from metaopt.estimators.cost import Cost
from metaopt.estimators.darts import DARTS
from metaopt.estimators.evograd import EvoGrad
from metaopt.estimators.evolution import NRES, PES, AntitheticES, TruncatedES
from metaopt.estimators.f2sa import F2SA
from metaopt.estimators.fds import FDS
from metaopt.estimators.first_order import FirstOrder
from metaopt.estimators.forward import FMD
from metaopt.estimators.forward_gradient import ForwardGradient
from metaopt.estimators.hyperdistill import HyperDistill
from metaopt.estimators.hypergradient import (
    Hypergradient,
    UnusedHyperparameterWarning,
    ZeroHypergradientWarning,
    cycle,
    hypergradient,
)
from metaopt.estimators.implicit import IFT, NotConvergedWarning
from metaopt.estimators.outer import OuterObjective
from metaopt.estimators.reverse import RMD, DrMAD, OneStep, TruncatedRMD
from metaopt.estimators.sama import SAMA
from metaopt.estimators.soba import SOBA
from metaopt.estimators.unroll import unroll
from metaopt.estimators.uoro import UORO

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
    "HyperDistill",
    "Hypergradient",
    "NotConvergedWarning",
    "OneStep",
    "OuterObjective",
    "Response",
    "TruncatedES",
    "TruncatedRMD",
    "UnusedHyperparameterWarning",
    "ZeroHypergradientWarning",
    "compiled",
    "cycle",
    "hypergradient",
    "unroll",
]
