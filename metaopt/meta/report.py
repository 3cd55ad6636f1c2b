"""What a loop tells after each of its rounds, and what it does about numbers that are not finite."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

from metaopt import tree
from metaopt.estimators.cost import Cost
from metaopt.estimators.hypergradient import Hypergradient
from metaopt.inner.state import InnerState
from metaopt.tree import Tree

try:
    import resource
except ImportError:  # Windows
    resource = None

Guard: TypeAlias = Literal["raise", "skip", "stop"]
"""What becomes of a hypergradient that is not finite.

"raise": the error is raised. "skip": λ stays as it is, and the loop goes on. "stop": λ stays as it
is, and the loop ends after its report.
"""


class Report(NamedTuple):
    """One run of :func:`metaopt.tune`, or one inner step of :func:`metaopt.online`.

    Attributes:
        number: of the run or step, from 1.
        lam: hyperparameters after it.
        state: inner state after it; where the run broke off (``guard``), the one that it started from.
        hypergradient: what moved λ, taken before the update; ``None`` where λ was not moved.
        cost: work since the last report.
        seconds: since the last report, the user's own code between the two included.
        bytes: peak memory so far: what torch had allocated on the GPU of the weights, or the
            process's on a CPU.
        skipped: updates left out so far because a number was not finite.
        initial: initial weights after it, where the loop learns them; else ``None``.
    """

    number: int
    lam: Tree
    state: InnerState
    hypergradient: Hypergradient | None
    cost: Cost
    seconds: float
    bytes: int
    skipped: int = 0
    initial: Tree = None

    @property
    def outer_loss(self) -> Tensor | None:
        """The outer loss where λ moved, else ``None``."""
        return None if self.hypergradient is None else self.hypergradient.outer_loss

    @property
    def norms(self) -> dict[str, float]:
        """The hypergradient's norm for each leaf of λ; empty where λ was not moved."""
        if self.hypergradient is None:
            return {}
        leaves = zip(tree.dotted_names(self.lam), tree.leaves(self.hypergradient.total), strict=True)
        return {name or "lam": float(leaf.norm()) for name, leaf in leaves}

    def __repr__(self) -> str:
        """The numbers, without the tensors."""
        loss = "-" if self.outer_loss is None else f"{float(self.outer_loss):.6g}"
        norms = ", ".join(f"{name} {value:.3g}" for name, value in self.norms.items())
        skipped = f", skipped {self.skipped}" if self.skipped else ""
        return f"Report({self.number}: outer loss {loss}, |hypergradient| {norms or '-'}{skipped})"


class Reports(Iterator[Report]):
    """The reports of a loop, made one by one as they are asked for.

    Attributes:
        total: how many there will be, ``None`` where that is not known.
        unit: what one is of, "run" or "step".
    """

    def __init__(self, reports: Generator[Report, None, None], total: int | None, unit: str) -> None:
        """Nothing runs before the first is asked for."""
        self._reports = reports
        self.total = total
        self.unit = unit

    @override
    def __next__(self) -> Report:
        return next(self._reports)

    def close(self) -> None:
        """End the loop after this report; what is open is closed."""
        self._reports.close()

    def __repr__(self) -> str:
        """How many there will be."""
        return f"Reports({'?' if self.total is None else self.total} {self.unit}s)"


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far; see :class:`Report`. 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
