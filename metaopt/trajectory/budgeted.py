"""As much of the run as a number of bytes allows."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from torch import Tensor
from typing_extensions import override

from metaopt import checks, replay, tree
from metaopt.inner.contract import Step
from metaopt.inner.state import InnerState
from metaopt.trajectory._weighing import weighed
from metaopt.trajectory.base import Moment, Trajectory
from metaopt.trajectory.checkpointed import Checkpointed, CheckpointedTape
from metaopt.trajectory.store import ByReference
from metaopt.tree import Tree


class Sized(NamedTuple):
    """One step's graph, and the bytes that only it holds."""

    moment: Moment
    size: int


@dataclass
class BudgetedTape:
    """The states (or checkpoints), the newest graphs, and how big a state and a graph of this batch's shapes are.

    Attributes:
        states: tape of the checkpoints.
        keeper: the trajectory that made it.
        graphs: of the newest steps, oldest first.
        state_size: bytes of a state.
        sizes: shapes of a batch to bytes of a graph.
    """

    states: CheckpointedTape
    keeper: Checkpointed
    state_size: int
    graphs: deque[Sized] = field(default_factory=deque)
    sizes: dict[Any, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Budgeted(Trajectory):
    """Graphs of as many of the last steps as fit into ``bytes``; states for the rest.

    Checkpoints when even those do not fit.

    States come first, since a state saves a step for far fewer bytes than a graph does. Cost: from
    that of :class:`Graphs` (all graphs fit) over :class:`Full` (states only) to that of
    :class:`Checkpointed`; the numbers are the same. What a graph holds is measured by what autograd
    saves for it, without what states, λ and batches hold anyway. While the run goes, one more graph
    may be alive.

    Args:
        bytes: the budget; the first state is held in any case.

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 0.5 * ((w - lam) ** 2).sum(), mo.optim.SGD(lr=0.5))
    >>> problem = mo.Problem(step, lambda w, lam, _: w.sum(), torch.zeros(1), torch.ones(1), [None] * 2)
    >>> problem.hypergradient(mo.RMD(mo.trajectory.Budgeted(1 << 20))).total  # exact: 1 - (1 - 0.5)²
    tensor([0.7500])
    """

    exact: ClassVar[bool] = True
    bounded: ClassVar[bool] = False

    bytes: int

    def __post_init__(self) -> None:
        checks.count(self, "bytes", self.bytes)

    @override
    def start(self, state: InnerState, lam: Tree) -> BudgetedTape:
        size = sum(x.numel() * x.element_size() for x in tree.floats(state))
        keeper = Checkpointed(slots=max(1, self.bytes // max(1, size)), store=ByReference())
        return BudgetedTape(keeper.start(state, lam), keeper, size)

    @override
    def record(
        self, tape: BudgetedTape, step: Step, state: InnerState, lam: Tree, batch: Any
    ) -> tuple[InnerState, BudgetedTape]:
        if tape.sizes and min(tape.sizes.values()) > self._room(tape):
            tape.graphs.clear()
            new, _ = tape.keeper.record(tape.states, step, state, lam, batch)
            return new, tape
        rng = replay.snapshot(state)
        tape.keeper.before(tape.states, state, lam, batch)
        shapes = tuple(tuple(x.shape) for x in tree.leaves(batch) if isinstance(x, Tensor))
        if shapes in tape.sizes:
            linearized = step.linearize(state, lam, batch)
        else:
            moment = Moment(state, lam, batch, rng)
            linearized, size = weighed(lambda: moment.linearize(step), (state, lam, batch))
            tape.sizes[shapes] = size
        new = linearized.state
        tape.keeper.after(tape.states, new, batch, linearized.loss)
        graph = Moment(state, lam, batch, rng, linearized)
        tape.graphs.append(Sized(graph, tape.sizes[shapes]))
        while tape.graphs and sum(graph.size for graph in tape.graphs) > self._room(tape):
            tape.graphs.popleft()
        return new, tape

    @override
    def moments(self, tape: BudgetedTape, step: Step, last: InnerState) -> Iterator[Moment]:
        yield from (graph.moment for graph in reversed(tape.graphs))
        without_graph = tape.states.steps - len(tape.graphs)
        yield from tape.keeper.moments_until(tape.states, step, without_graph)

    @override
    def complete(self, tape: BudgetedTape) -> bool:
        return True

    def _room(self, tape: BudgetedTape) -> int:
        return self.bytes - len(tape.states.held) * tape.state_size
