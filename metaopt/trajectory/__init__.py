"""What is remembered of an inner run."""

from metaopt.trajectory import replay
from metaopt.trajectory.base import Moment, Trajectory
from metaopt.trajectory.distilled import Distillate, Distilled
from metaopt.trajectory.full import Full
from metaopt.trajectory.interpolated import Interpolated
from metaopt.trajectory.last import Last

__all__ = [
    "Distillate",
    "Distilled",
    "Full",
    "Interpolated",
    "Last",
    "Moment",
    "Trajectory",
    "replay",
]
