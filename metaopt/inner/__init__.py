"""Φ: the inner step, its derivatives, compiled and in chunks."""

from metaopt.inner._first_look import MathAttentionWarning, UndeclaredTensorWarning, UnreachedWeightWarning
from metaopt.inner.adjoint import Adjoint, Gradient
from metaopt.inner.chunk import Chunk, chunked, in_chunks
from metaopt.inner.closed import closed_over
from metaopt.inner.compiled import Compilation
from metaopt.inner.constant_slots import ConstantSlots
from metaopt.inner.contract import Linearized, Stationary, Step, WrappedStep
from metaopt.inner.custom import CustomStep, custom_step
from metaopt.inner.forward_over_reverse import ForwardOverReverse
from metaopt.inner.reverse_over_reverse import ReverseOverReverse
from metaopt.inner.reweighted import AsymmetricUpdateError, reweighted
from metaopt.inner.state import InnerState
from metaopt.inner.step import InnerStep, inner_of, inner_step
from metaopt.inner.tasks import (
    Looped,
    Ragged,
    Stacked,
    TaskLoss,
    Vmapped,
    for_all_tasks,
    is_stacked,
    looped,
    replicated,
    vmapped,
)
from metaopt.inner.with_buffers import StepWithBuffers, inner_step_with_buffers

__all__ = [
    "Adjoint",
    "AsymmetricUpdateError",
    "Chunk",
    "Compilation",
    "ConstantSlots",
    "CustomStep",
    "ForwardOverReverse",
    "Gradient",
    "InnerState",
    "InnerStep",
    "Linearized",
    "Looped",
    "MathAttentionWarning",
    "Ragged",
    "ReverseOverReverse",
    "Stacked",
    "Stationary",
    "Step",
    "StepWithBuffers",
    "TaskLoss",
    "UndeclaredTensorWarning",
    "UnreachedWeightWarning",
    "Vmapped",
    "WrappedStep",
    "chunked",
    "closed_over",
    "custom_step",
    "for_all_tasks",
    "in_chunks",
    "inner_of",
    "inner_step",
    "inner_step_with_buffers",
    "is_stacked",
    "looped",
    "replicated",
    "reweighted",
    "vmapped",
]
