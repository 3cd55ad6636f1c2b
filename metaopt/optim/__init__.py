"""The inner optimisers: as torch.optim's, but pure and differentiable."""

from metaopt.optim import moments, safe, schedules
from metaopt.optim.accumulate import Accumulate
from metaopt.optim.adadelta import Adadelta
from metaopt.optim.adafactor import Adafactor
from metaopt.optim.adagrad import Adagrad
from metaopt.optim.adam import Adam
from metaopt.optim.adamax import Adamax
from metaopt.optim.adamw import AdamW
from metaopt.optim.asgd import ASGD
from metaopt.optim.average import EMA
from metaopt.optim.by import by
from metaopt.optim.clip import ClipNorm, ClipValue
from metaopt.optim.groups import Frozen, Groups
from metaopt.optim.lion import Lion
from metaopt.optim.maximise import Maximise
from metaopt.optim.muon import Muon
from metaopt.optim.nadam import NAdam
from metaopt.optim.optimizer import Hyper, Optimizer
from metaopt.optim.parametrisations import Interval, positive, simplex, unit_interval
from metaopt.optim.per_task import PerTask
from metaopt.optim.precondition import Precondition, identity_factors, meta_curvature
from metaopt.optim.radam import RAdam
from metaopt.optim.rmsprop import RMSprop
from metaopt.optim.rprop import Rprop
from metaopt.optim.sgd import SGD
from metaopt.optim.wrapper import Wrapper

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
    "ClipNorm",
    "ClipValue",
    "Frozen",
    "Groups",
    "Hyper",
    "Interval",
    "Lion",
    "Maximise",
    "Muon",
    "NAdam",
    "Optimizer",
    "PerTask",
    "Precondition",
    "RAdam",
    "RMSprop",
    "Rprop",
    "Wrapper",
    "by",
    "identity_factors",
    "meta_curvature",
    "moments",
    "positive",
    "safe",
    "schedules",
    "simplex",
    "unit_interval",
]
