"""Φ: the inner step and the optimisers it is made of."""

from metaopt.inner import moments, safe, schedules
from metaopt.inner.accumulate import Accumulate
from metaopt.inner.adadelta import Adadelta
from metaopt.inner.adafactor import Adafactor
from metaopt.inner.adagrad import Adagrad
from metaopt.inner.adam import Adam
from metaopt.inner.adamax import Adamax
from metaopt.inner.adamw import AdamW
from metaopt.inner.adjoint import Adjoint, ForwardOverReverse, Gradient, ReverseOverReverse
from metaopt.inner.asgd import ASGD
from metaopt.inner.average import EMA
from metaopt.inner.chunk import Chunk, chunked, in_chunks
from metaopt.inner.clip import ClipNorm, ClipValue
from metaopt.inner.closed import closed_over
from metaopt.inner.compiled import Compilation
from metaopt.inner.constant_slots import ConstantSlots
from metaopt.inner.custom import CustomStep, custom_step
from metaopt.inner.groups import Frozen, Groups
from metaopt.inner.lion import Lion
from metaopt.inner.maximise import Maximise
from metaopt.inner.muon import Muon
from metaopt.inner.nadam import NAdam
from metaopt.inner.optimizer import Hyper, Optimizer
from metaopt.inner.per_task import PerTask
from metaopt.inner.precondition import Precondition, identity_factors, meta_curvature
from metaopt.inner.radam import RAdam
from metaopt.inner.reweighted import AsymmetricUpdateError, reweighted
from metaopt.inner.rmsprop import RMSprop
from metaopt.inner.rprop import Rprop
from metaopt.inner.sgd import SGD
from metaopt.inner.state import InnerState
from metaopt.inner.step import InnerStep, Linearized, Stationary, Step, inner_step
from metaopt.inner.tangents import Tangents
from metaopt.inner.wrapper import Wrapper

__all__ = [
    "ASGD",
    "EMA",
    "SGD",
    "Accumulate",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Adjoint",
    "AsymmetricUpdateError",
    "Chunk",
    "ClipNorm",
    "ClipValue",
    "Compilation",
    "ConstantSlots",
    "CustomStep",
    "ForwardOverReverse",
    "Frozen",
    "Gradient",
    "Groups",
    "Hyper",
    "InnerState",
    "InnerStep",
    "Linearized",
    "Lion",
    "Maximise",
    "Muon",
    "NAdam",
    "Optimizer",
    "PerTask",
    "Precondition",
    "RAdam",
    "RMSprop",
    "ReverseOverReverse",
    "Rprop",
    "Stationary",
    "Step",
    "Tangents",
    "Wrapper",
    "chunked",
    "closed_over",
    "custom_step",
    "identity_factors",
    "in_chunks",
    "inner_step",
    "meta_curvature",
    "moments",
    "reweighted",
    "safe",
    "schedules",
]
