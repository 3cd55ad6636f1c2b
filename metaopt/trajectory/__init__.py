"""What is remembered of an inner run."""

from metaopt.trajectory.base import Moment, Trajectory
from metaopt.trajectory.budgeted import Budgeted
from metaopt.trajectory.checked import Checked
from metaopt.trajectory.checkpointed import Checkpointed
from metaopt.trajectory.distilled import Distillate, Distilled
from metaopt.trajectory.fingerprint import fingerprint
from metaopt.trajectory.full import Full
from metaopt.trajectory.graphs import Graphs
from metaopt.trajectory.interpolated import Interpolated
from metaopt.trajectory.last import Last
from metaopt.trajectory.offloaded import Offloaded
from metaopt.trajectory.reversible import Reversible
from metaopt.trajectory.revolve import Placement
from metaopt.trajectory.store import ByReference, OnDevice, OnDisk, Store

__all__ = [
    "Budgeted",
    "ByReference",
    "Checked",
    "Checkpointed",
    "Distillate",
    "Distilled",
    "Full",
    "Graphs",
    "Interpolated",
    "Last",
    "Moment",
    "Offloaded",
    "OnDevice",
    "OnDisk",
    "Placement",
    "Reversible",
    "Store",
    "Trajectory",
    "fingerprint",
]
