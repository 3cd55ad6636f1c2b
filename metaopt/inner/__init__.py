"""Φ: the inner step and the optimisers it is made of."""

from metaopt.inner.constant_slots import ConstantSlots
from metaopt.inner.custom import CustomStep, custom_step
from metaopt.inner.optimizer import Hyper, Optimizer
from metaopt.inner.sgd import SGD
from metaopt.inner.state import InnerState
from metaopt.inner.step import InnerStep, Linearized, Step, inner_step

__all__ = [
    "SGD",
    "ConstantSlots",
    "CustomStep",
    "Hyper",
    "InnerState",
    "InnerStep",
    "Linearized",
    "Optimizer",
    "Step",
    "custom_step",
    "inner_step",
]
