"""Φ: the inner step and the optimisers it is made of."""

from metaopt.inner.adjoint import Adjoint, ForwardOverReverse, Gradient, ReverseOverReverse
from metaopt.inner.closed import closed_over
from metaopt.inner.constant_slots import ConstantSlots
from metaopt.inner.custom import CustomStep, custom_step
from metaopt.inner.optimizer import Hyper, Optimizer
from metaopt.inner.sgd import SGD
from metaopt.inner.state import InnerState
from metaopt.inner.step import InnerStep, Linearized, Step, inner_step

__all__ = [
    "SGD",
    "Adjoint",
    "ConstantSlots",
    "CustomStep",
    "ForwardOverReverse",
    "Gradient",
    "Hyper",
    "InnerState",
    "InnerStep",
    "Linearized",
    "Optimizer",
    "ReverseOverReverse",
    "Step",
    "closed_over",
    "custom_step",
    "inner_step",
]
