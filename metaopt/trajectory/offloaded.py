"""The remembered states, somewhere with more room than where the run happens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from typing_extensions import override

from metaopt import checks
from metaopt.inner.contract import Step
from metaopt.inner.state import InnerState
from metaopt.trajectory.base import Moment, Trajectory
from metaopt.trajectory.checkpointed import Checkpointed, CheckpointedTape
from metaopt.trajectory.store import ByReference, OnDevice, OnDisk, Store
from metaopt.tree import Tree


@dataclass(frozen=True)
class Offloaded(Trajectory):
    """States on another device or in memory-mapped files.

    All of them, or those that a checkpointed trajectory holds.

    The numbers are those of :class:`Full`. Cost: copying each held state away and back. Memory
    where the run happens: one state. Files have no names, so that nothing is left behind, even if
    the process is killed (POSIX systems).

    >>> Offloaded(device="cpu", of=Checkpointed(slots=10)).checkpoints.slots
    10

    Args:
        device: where the states go, e.g. ``"cpu"`` for a run on a GPU; or
        directory: a directory on a disk with room for them; it is made if it is not there.
        of: which states; default: all.

    Raises:
        ValueError: unless exactly one of ``device`` and ``directory`` is given.
    """

    exact: ClassVar[bool] = True
    bounded: ClassVar[bool] = False

    device: str | None = None
    directory: str | None = None
    of: Checkpointed = Checkpointed(every=1)

    def __post_init__(self) -> None:
        if (self.device is None) == (self.directory is None):
            raise ValueError(
                f"Offloaded: give either device or directory, got device={self.device!r}, directory={self.directory!r}"
            )
        for name in ("device", "directory"):
            if getattr(self, name) is not None:
                checks.instance(self, name, getattr(self, name), str)
        if self.of.store != ByReference():
            raise ValueError(f"Offloaded: the trajectory to offload has a store already: {self.of.store}")

    @property
    def checkpoints(self) -> Checkpointed:
        """The trajectory that does the work."""
        store: Store = OnDisk(self.directory) if self.directory is not None else OnDevice(str(self.device))
        return replace(self.of, store=store)

    @override
    def start(self, state: InnerState, lam: Tree) -> CheckpointedTape:
        return self.checkpoints.start(state, lam)

    @override
    def record(
        self, tape: CheckpointedTape, step: Step, state: InnerState, lam: Tree, batch: Any
    ) -> tuple[InnerState, CheckpointedTape]:
        return self.checkpoints.record(tape, step, state, lam, batch)

    @override
    def moments(self, tape: CheckpointedTape, step: Step, last: InnerState) -> Iterator[Moment]:
        return self.checkpoints.moments(tape, step, last)

    @override
    def complete(self, tape: CheckpointedTape) -> bool:
        return True
