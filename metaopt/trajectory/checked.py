"""A trajectory under guard: what is replayed must be what was run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from typing_extensions import override

from metaopt import replay
from metaopt.inner.contract import Step
from metaopt.inner.state import InnerState
from metaopt.trajectory.base import Moment, Trajectory
from metaopt.trajectory.fingerprint import fingerprint
from metaopt.trajectory.reversible import Reversible
from metaopt.tree import Tree


class CheckedTape(NamedTuple):
    """The guarded tape, and the fingerprints of the states ``s_0, s_1, …``."""

    tape: Any
    prints: list[int]


@dataclass(frozen=True)
class Checked(Trajectory):
    """The same trajectory as ``of``; in the sweep every step is compared, bit for bit, with the run.

    Two states are compared: the one that a step is said to have started from, and the one that it
    leads to when run again. So it finds checkpoints and reversals that went astray, and steps that
    are not functions of ``(state, lam, batch)``: batches changed in place, random numbers from
    outside torch, buffers that move, another number of threads.

    :class:`Reversible` runs its steps in fixed point, and only the first of the two is compared.
    Over :class:`Budgeted`, some steps run with their graph and are recomputed without. GroupNorm,
    SiLU and Mish round otherwise then, and that is reported too.

    Cost: one gradient and two checksums per step. Memory: ``of``'s, and eight bytes per step.

    Args:
        of: an exact trajectory.

    Raises:
        ValueError: if ``of`` is not exact.
        RuntimeError: in the sweep, naming the step.

    >>> import metaopt as mo, torch
    >>> step = mo.inner_step(lambda w, lam, _: 0.5 * ((w - lam) ** 2).sum(), mo.optim.SGD(lr=0.5))
    >>> problem = mo.Problem(step, lambda w, lam, _: w.sum(), torch.zeros(1), torch.ones(1), [None] * 2)
    >>> checked = mo.trajectory.Checked(mo.trajectory.Full())
    >>> problem.hypergradient(mo.RMD(checked)).total  # exact, and every replay was compared
    tensor([0.7500])
    """

    exact: ClassVar[bool] = True

    of: Trajectory

    def __post_init__(self) -> None:
        if not self.of.exact:
            raise ValueError(
                f"{type(self.of).__name__} does not claim to give back the states of the run, so there is nothing to "
                "check"
            )

    @property
    def bounded(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the memory of ``of`` is bounded."""
        return self.of.bounded

    @override
    def start(self, state: InnerState, lam: Tree) -> CheckedTape:
        return CheckedTape(self.of.start(state, lam), [])

    @override
    def record(
        self, tape: CheckedTape, step: Step, state: InnerState, lam: Tree, batch: Any
    ) -> tuple[InnerState, CheckedTape]:
        if not tape.prints:
            tape.prints.append(fingerprint(state))
        new, inner = self.of.record(tape.tape, step, state, lam, batch)
        tape.prints.append(fingerprint(new))
        return new, CheckedTape(inner, tape.prints)

    @override
    def moments(self, tape: CheckedTape, step: Step, last: InnerState) -> Iterator[Moment]:
        t = len(tape.prints) - 1
        for moment in self.of.moments(tape.tape, step, last):
            if fingerprint(moment.state) != tape.prints[t - 1]:
                raise RuntimeError(
                    f"step {t}: the state it started from was not recomputed to the bit ({type(self.of).__name__}); "
                    f"{_CAUSES}"
                )
            if not isinstance(self.of, Reversible) and fingerprint(_again(step, moment)) != tape.prints[t]:
                raise RuntimeError(f"step {t}: run again from the same state, it leads elsewhere; {_CAUSES}")
            yield moment
            t -= 1

    @override
    def complete(self, tape: CheckedTape) -> bool:
        return self.of.complete(tape.tape)


def _again(step: Step, moment: Moment) -> InnerState:
    """Where the step leads, computed as in the run: a gradient with its graph is not always the same to the bit."""
    if moment.linearized is not None:
        return moment.linearized.state
    replay.restore(moment.rng)
    return step(moment.state, moment.lam, moment.batch)


_CAUSES = (
    "the step must be a function of (state, lam, batch) alone: look for batches or lam changed in place, random "
    "numbers from outside torch, buffers of a module that move, nondeterministic kernels, or another number of threads"
)
