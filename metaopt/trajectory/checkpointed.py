"""Some states of the run; the others are recomputed from them in the sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor
from typing_extensions import override

from metaopt import checks, replay
from metaopt.inner.contract import Step
from metaopt.inner.state import InnerState
from metaopt.replay import Rng
from metaopt.trajectory.base import Moment, Trajectory, check_during, check_fixed, check_since
from metaopt.trajectory.fingerprint import fingerprint
from metaopt.trajectory.revolve import Binomial, Periodic, Placement, SquareRoot, split
from metaopt.trajectory.store import ByReference, Store
from metaopt.tree import Tree


class Held(NamedTuple):
    """A state as the store keeps it, and the random state before the step that leaves it."""

    kept: Any
    rng: Rng


@dataclass
class CheckpointedTape:
    """What is known of a run in progress.

    Attributes:
        lam: as it was at the start (to notice if it moves).
        versions: of λ, then.
        placement: which states are held.
        held: number of a state to what is kept of it.
        batches: per step, the batch, or its fingerprint where batches are asked for again.
        batch_versions: per step, the in-place version counters of its batch.
        losses: per step, its inner loss, where that is known.
        rngs: per step, the random state before it; ``None`` where nothing was drawn since the step
            before ended.
        after: random state after the newest step.
    """

    lam: Tree
    versions: tuple[int, ...]
    placement: Placement
    held: dict[int, Held]
    batches: list[Any] = field(default_factory=list)
    batch_versions: list[tuple[int, ...]] = field(default_factory=list)
    losses: list[Tensor | None] = field(default_factory=list)
    rngs: list[Rng | None] = field(default_factory=list)
    after: Rng | None = None

    @property
    def steps(self) -> int:
        """How many steps the run has taken so far."""
        return len(self.batches)


@dataclass(frozen=True)
class Checkpointed(Trajectory):
    """A few states, placed so that recomputing the rest costs little.

    The numbers are those of :class:`Full`, to the bit on a CPU.

    Griewank and Walther 2000, "Algorithm 799: Revolve"; Chen et al. 2016, `arXiv 1604.06174
    <https://arxiv.org/abs/1604.06174>`__ (√T).

    Binomial (the default): ``slots`` states; with ``r`` the smallest number with ``C(slots + r, r)
    ≥ T``, no step is run forward more than ``r + 1`` times (``r`` where ``horizon`` says what T
    is), the run itself included: T = 1000 with 17 slots recomputes no step more than 3 times (2
    with ``horizon``), the sweep's own gradient aside. ``every=k``: once, with ``T/k + k`` states.
    ``"sqrt"``: once, ``O(√T)`` states.

    Cost: the recomputed steps, and one gradient per step in the sweep. Memory: ``slots · |s|``,
    whatever T is; besides, references to the batches and, for steps that draw random numbers,
    nothing unless something else draws between them (then 5 KB each). A sweep uses the checkpoints
    up as it goes back; a second one over the same run starts from ``s_0`` (with ``every`` and
    ``"sqrt"`` they stay).

    Args:
        slots: number of states held at most, or ``"sqrt"``.
        every: hold every k-th state instead.
        horizon: T, if it is known beforehand: saves a repetition.
        store: where the held states are kept (see :class:`metaopt.trajectory.Offloaded`).
        batches: the function ``t -> batch`` that the run takes its batches from. They are then not
            kept but asked for again in the sweep; it must be pure, and each batch is compared with
            the one of the run (by checksum).

    Raises:
        ValueError: for impossible settings.
        RuntimeError: in a sweep, if ``batches`` gives another batch than in the run.

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 0.5 * ((w - lam) ** 2).sum(), mo.optim.SGD(lr=0.5))
    >>> problem = mo.Problem(step, lambda w, lam, _: w.sum(), torch.zeros(1), torch.ones(1), [None] * 2)
    >>> problem.hypergradient(mo.RMD(mo.trajectory.Checkpointed(slots=1))).total  # exact: 1 - (1 - 0.5)²
    tensor([0.7500])
    """

    exact: ClassVar[bool] = True
    bounded: ClassVar[bool] = False

    slots: int | Literal["sqrt"] = 17
    every: int | None = None
    horizon: int | None = None
    store: Store = ByReference()
    batches: Callable[[int], Any] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.slots, str):
            checks.one_of(self, "slots", self.slots, ["sqrt"])
        else:
            checks.count(self, "slots", self.slots)
        if self.every is not None:
            checks.count(self, "every", self.every)
        if self.horizon is not None:
            checks.count(self, "horizon", self.horizon)
        if self.batches is not None:
            checks.function(self, "batches", self.batches, "t -> batch")

    @override
    def start(self, state: InnerState, lam: Tree) -> CheckpointedTape:
        first = Held(self.store.put(state), replay.snapshot(state))
        return CheckpointedTape(lam, replay.versions_of(lam), self._placement(), {0: first})

    @override
    def record(
        self, tape: CheckpointedTape, step: Step, state: InnerState, lam: Tree, batch: Any
    ) -> tuple[InnerState, CheckpointedTape]:
        self.before(tape, state, lam, batch)
        new, loss = step.evaluate(state, lam, batch)
        self.after(tape, new, batch, loss)
        return new, tape

    def before(self, tape: CheckpointedTape, state: InnerState, lam: Tree, batch: Any) -> None:
        """The part of :meth:`record` that comes before the step; after the step comes :meth:`after`."""
        check_fixed(lam, tape.lam, tape.versions, "a checkpointed trajectory")
        index = tape.steps
        before = replay.snapshot(state)
        if index == 0:
            tape.held[0] = tape.held[0]._replace(rng=before)
        elif self._visit(tape, index):
            tape.held[index] = Held(self.store.put(state), before)
        tape.rngs.append(None if tape.after is not None and replay.same(before, tape.after) else before)
        tape.batches.append(batch if self.batches is None else fingerprint(batch))
        tape.batch_versions.append(replay.versions_of(batch))

    def after(self, tape: CheckpointedTape, new: InnerState, batch: Any, loss: Tensor | None) -> None:
        """The part of :meth:`record` that comes after the step."""
        tape.after = replay.snapshot(new)
        tape.losses.append(loss)
        if self.batches is None:
            check_during(tape.steps, batch, tape.batch_versions[-1])

    @override
    def moments(self, tape: CheckpointedTape, step: Step, last: InnerState) -> Iterator[Moment]:
        return self.moments_until(tape, step, tape.steps)

    def moments_until(self, tape: CheckpointedTape, step: Step, newest: int) -> Iterator[Moment]:
        """The steps ``newest``, …, 1 of the run."""
        check_fixed(tape.lam, tape.lam, tape.versions, "a checkpointed trajectory")
        extra: dict[int, Held] = {}
        for t in range(newest, 0, -1):
            _forget(extra, t - 1)
            if self._consumes:
                _forget(tape.held, t - 1)
                tape.placement.forget(t - 1)
            state, rng = self._state(tape, step, t - 1, extra)
            yield Moment(state, tape.lam, self._batch(tape, t), rng, loss=tape.losses[t - 1])

    @override
    def complete(self, tape: CheckpointedTape) -> bool:
        return True

    # -- parts -----------------------------------------------------------------------------------
    def _placement(self) -> Placement:
        if self.every is not None:
            return Periodic(every=self.every)
        return SquareRoot() if isinstance(self.slots, str) else Binomial(slots=self.slots, horizon=self.horizon)

    @property
    def _consumes(self) -> bool:
        """Whether a sweep gives its checkpoints' room to recomputed states: with a fixed number of slots."""
        return self.every is None and self.slots != "sqrt"

    def _visit(self, tape: CheckpointedTape, index: int) -> bool:
        keep, dropped = tape.placement.visit(index)
        if dropped is not None:
            del tape.held[dropped]
        return keep

    def _state(self, tape: CheckpointedTape, step: Step, index: int, extra: dict[int, Held]) -> tuple[InnerState, Rng]:
        """State number ``index``.

        From the newest one at hand before it, leaving checkpoints on the way where there is room.
        """
        held = extra.get(index) or tape.held.get(index)
        if held is not None:
            return self.store.get(held.kept), held.rng
        at = max(i for i in (*tape.held, *extra) if i < index)
        held = extra.get(at) or tape.held[at]
        state = self.store.get(held.kept)
        rng = held.rng
        while at < index:
            free = self.slots - len(tape.held) - len(extra) if isinstance(self.slots, int) and self._consumes else index
            target = min(at + split(index + 1 - at, free + 1), index)
            state, rng = self._advance(tape, step, state, rng, at, target)
            at = target
            if free > 0 and at < index:
                extra[at] = Held(self.store.put(state), rng)
        return state, rng

    def _advance(
        self, tape: CheckpointedTape, step: Step, state: InnerState, rng: Rng, at: int, to: int
    ) -> tuple[InnerState, Rng]:
        """From state ``at`` to state ``to``, drawing what the run drew."""
        for index in range(at, to):
            batch = self._batch(tape, index + 1)
            replay.restore(rng)
            state = step(state, tape.lam, batch)
            rng = tape.rngs[index + 1] or replay.snapshot(state)
        return state, rng

    def _batch(self, tape: CheckpointedTape, t: int) -> Any:
        if self.batches is None:
            check_since(t, tape.batches[t - 1], tape.batch_versions[t - 1])
            return tape.batches[t - 1]
        batch = self.batches(t)
        if fingerprint(batch) != tape.batches[t - 1]:
            raise RuntimeError(
                f"batches({t}) gave another batch in the sweep than in the run, so the trajectory cannot be "
                "replayed: make it a pure function of t "
                "(seed a torch.Generator with t), or leave out Checkpointed(batches=...) so that batches are kept"
            )
        return batch


def _forget(held: dict[int, Held], newest: int) -> None:
    for index in [i for i in held if i > newest]:
        del held[index]
