r"""Which estimator: from the size of the problem, by a cost model that the measured counts confirm.

With T inner steps, s bytes of state (weights and optimiser slots), :math:`|\lambda|`
hyperparameters, c checkpoints and K last steps, one hypergradient takes, inner run included,

========================  ==========================  ================  =================
estimator                 gradients                   products          states held
========================  ==========================  ================  =================
``RMD()``                 2T                          2T                T
``RMD(Checkpointed(c))``  2T + those run again        2T                c
``FMD()``                 T                           |λ|T (tangents)   |λ|
``IFT(Neumann(N))``       T + 1                       N + 1             0
``HyperDistill()``        T + 1                       1                 1
``OneStep()``             T                           1 (T = 1: 2)      0
``AntitheticES(n)``       (1 + 2n)T                   0                 2n
========================  ==========================  ================  =================

Steps run again with c checkpoints: :func:`repeated`, the binomial schedule of Griewank and Walther
2000.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from metaopt import tree
from metaopt.estimators import FMD, IFT, NRES, RMD, AntitheticES, Cost, Estimator, HyperDistill, OneStep
from metaopt.inner import InnerState
from metaopt.linsolve import Neumann
from metaopt.problem import Problem
from metaopt.trajectory import Checkpointed
from metaopt.trajectory.revolve import split


@dataclass(frozen=True, repr=False)
class Suggestion:
    """What :func:`suggest_estimator` returns.

    Attributes:
        estimator: ready to use.
        reason: why, in words.
        cost: what the model predicts for one hypergradient at the end of the run.
        state_bytes: bytes of the states it holds, at most; one graph of the inner gradient comes on
            top.
    """

    estimator: Estimator
    reason: str
    cost: Cost
    state_bytes: int

    def __repr__(self) -> str:
        return f"{self.estimator}: {self.reason} Predicted: {self.cost}, {self.state_bytes / 2**20:.1f} MiB of states."


class Sizes(NamedTuple):
    """What the cost model reads of a problem.

    Attributes:
        horizon: T, inner steps of a run.
        hyperparameters: ``|λ|``.
        state_bytes: bytes of one state: the weights and the slots of the optimiser.
    """

    horizon: int
    hyperparameters: int
    state_bytes: int

    @classmethod
    def of(cls, problem: Problem) -> Sizes:
        """The sizes of a problem."""
        state = problem.w0
        if not isinstance(state, InnerState):
            state = problem.step.init(problem.w0, problem.lam)
        held = tree.floats((state.w, state.slots))
        held_bytes = sum(x.numel() * x.element_size() for x in held)
        numbers = sum(x.numel() for x in tree.floats(problem.lam))
        return cls(problem.T, numbers, held_bytes)


def suggest_estimator(
    problem: Problem | Sizes,
    *,
    memory: int = 1 << 30,
    online: bool = False,
    solved: bool = False,
    differentiable: bool = True,
) -> Suggestion:
    """The cheapest estimator that answers the question and fits, exact before approximate.

    Args:
        problem: the problem, or its sizes.
        memory: bytes that remembered states may take.
        online: whether λ moves during the run.
        solved: whether the run ends at a minimum of the inner loss, and λ enters through that loss.
        differentiable: whether Φ has useful derivatives.

    Raises:
        ValueError: for sizes that are not positive.

    >>> suggest_estimator(Sizes(horizon=100, hyperparameters=500, state_bytes=80_000)).estimator
    RMD(trajectory=Full())
    """
    sizes = problem if isinstance(problem, Sizes) else Sizes.of(problem)
    if min(sizes) < 1 or memory < 0:
        raise ValueError(f"sizes must be positive, got {sizes} and memory={memory}")
    if not differentiable:
        choice = _without_derivatives(online)
    elif solved and not online:
        choice = Choice(
            IFT(Neumann()),
            "the inner problem is solved, so its answer does not depend on the way there: no trajectory is needed.",
        )
    else:
        choice = _online(sizes, memory) if online else _offline(sizes, memory)
    held = states_held(choice.estimator, sizes.horizon, sizes.hyperparameters)
    cost = predicted_cost(choice.estimator, sizes.horizon, sizes.hyperparameters)
    return Suggestion(choice.estimator, choice.reason, cost, held * sizes.state_bytes)


class Choice(NamedTuple):
    """An estimator, and why it was chosen for these sizes."""

    estimator: Estimator
    reason: str


def _without_derivatives(online: bool) -> Choice:
    estimator = NRES() if online else AntitheticES()
    return Choice(
        estimator,
        "Φ has no useful derivatives, so only values of the outer loss are used: unbiased up to smoothing, noisy.",
    )


def _forward(sizes: Sizes, fits: int) -> Choice | None:
    few = sizes.hyperparameters
    if few > min(2, fits):
        return None
    why = (
        f"{few} hyperparameter(s) cost no more products forward than backward, exactly, in {few} state(s), online too."
    )
    return Choice(FMD(), why)


def _online(sizes: Sizes, memory: int) -> Choice:
    fits = memory // sizes.state_bytes
    forward = _forward(sizes, fits)
    if forward is not None:
        return forward
    if sizes.horizon > 1 and fits >= 1:
        return Choice(
            HyperDistill(),
            "λ moves during the run: one product looks over the whole horizon; fit θ with calibrate().",
        )
    return Choice(OneStep(), "λ moves during the run, and there is no room for (or no use of) a second state.")


def _offline(sizes: Sizes, memory: int) -> Choice:
    fits = memory // sizes.state_bytes
    forward = _forward(sizes, fits)
    if forward is not None:
        return forward
    T = sizes.horizon
    if fits >= T:
        return Choice(
            RMD(), f"all {T} states fit, so the exact gradient costs two gradients and two products per step."
        )
    if fits < 1:
        return Choice(OneStep(), "not one state fits beside the run itself.")
    again = repeated(T, fits)
    if again <= 4 * T:
        why = f"{fits} of {T} states fit: exact still, with {again} steps run again between checkpoints."
        return Choice(RMD(Checkpointed(slots=fits, horizon=T)), why)
    return Choice(
        HyperDistill(), f"only {fits} of {T} states fit, and exact reversal would run each step over four times."
    )


def predicted_cost(estimator: Estimator, horizon: int, hyperparameters: int) -> Cost:
    """The model of the module's table: exact for what :func:`suggest_estimator` gives, with λ in the inner loss.

    Raises:
        ValueError: for any other estimator.
    """
    T = horizon
    if isinstance(estimator, RMD):
        held = estimator.trajectory
        again = repeated(T, held.slots) if isinstance(held, Checkpointed) and isinstance(held.slots, int) else 0
        return Cost(steps=T + again, linearizations=T, products=2 * T)
    if isinstance(estimator, FMD):
        return Cost(linearizations=T, tangents=hyperparameters * T)
    if isinstance(estimator, IFT) and isinstance(estimator.solver, Neumann):
        return Cost(steps=T, linearizations=1, products=estimator.solver.terms + 1)
    if isinstance(estimator, HyperDistill):
        return Cost(steps=T, linearizations=1, products=1)
    if isinstance(estimator, OneStep):
        return Cost(linearizations=T, products=2 if T == 1 else 1)
    if isinstance(estimator, (NRES, AntitheticES)):
        return Cost(steps=(1 + 2 * estimator.pairs) * T)
    raise ValueError(f"there is no cost model for {type(estimator).__name__}")


def states_held(estimator: Estimator, horizon: int, hyperparameters: int) -> int:
    """States remembered at most, besides the current one."""
    if isinstance(estimator, RMD):
        held = estimator.trajectory
        return min(horizon, held.slots) if isinstance(held, Checkpointed) and isinstance(held.slots, int) else horizon
    if isinstance(estimator, FMD):
        return hyperparameters
    if isinstance(estimator, (NRES, AntitheticES)):
        return 2 * estimator.pairs
    return 1 if isinstance(estimator, HyperDistill) else 0


@cache
def repeated(length: int, slots: int) -> int:
    """Steps that reversing a run of known length runs again, from the checkpoints that the run itself left.

    >>> repeated(6, 2), repeated(6, 6)
    (5, 0)
    """
    at = split(length, slots)
    if at == length:
        return length * (length - 1) // 2
    return repeated(length - at, slots - 1) + _from_start(at, slots)


@cache
def _from_start(length: int, slots: int) -> int:
    """Steps to reverse ``length`` of them when only their start is held."""
    at = split(length, slots)
    if at == length:
        return length * (length - 1) // 2
    return at + _from_start(length - at, slots - 1) + _from_start(at, slots)
