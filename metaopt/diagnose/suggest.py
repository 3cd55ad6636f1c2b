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

from metaopt.estimators import FMD, IFT, NRES, RMD, AntitheticES, Cost, Estimator, HyperDistill, OneStep
from metaopt.linsolve import Neumann
from metaopt.trajectory import Checkpointed
from metaopt.trajectory.revolve import split


@dataclass(frozen=True)
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

    def __str__(self) -> str:
        """One paragraph."""
        return f"{self.estimator}: {self.reason} Predicted: {self.cost}, {self.state_bytes / 2**20:.1f} MiB of states."


def suggest_estimator(
    horizon: int,
    weights: int,
    hyperparameters: int,
    *,
    memory: int,
    online: bool = False,
    solved: bool = False,
    differentiable: bool = True,
    slots: int = 1,
    itemsize: int = 4,
) -> Suggestion:
    """The cheapest estimator that answers the question and fits, exact before approximate.

    Args:
        horizon: T, inner steps of a run.
        weights: |w|, numbers in all weights.
        hyperparameters: |λ|.
        memory: bytes that remembered states may take.
        online: whether λ moves during the run.
        solved: whether the run ends at a minimum of the inner loss, and λ enters through that loss.
        differentiable: whether Φ has useful derivatives.
        slots: numbers the optimiser keeps per weight: 0 for plain SGD, 1 with momentum, 2 for Adam.
        itemsize: bytes per number.

    Raises:
        ValueError: for sizes that are not positive.

    >>> suggest_estimator(100, 10_000, 500, memory=2**30).estimator
    RMD(trajectory=Full())
    """
    if min(horizon, weights, hyperparameters) < 1 or memory < 0 or slots < 0 or itemsize < 1:
        raise ValueError(
            f"sizes must be positive: horizon={horizon}, weights={weights}, hyperparameters={hyperparameters}, "
            f"memory={memory}, "
            f"slots={slots}, itemsize={itemsize}"
        )
    T = horizon
    state = weights * (1 + slots) * itemsize
    fits = memory // state
    if not differentiable:
        estimator = NRES() if online else AntitheticES()
        return _made(
            estimator,
            "Φ has no useful derivatives, so only values of the outer loss are used: unbiased up to smoothing, noisy.",
            T,
            0,
            state,
        )
    if solved and not online:
        return _made(
            IFT(Neumann()),
            "the inner problem is solved, so its answer does not depend on the way there: no trajectory is needed.",
            T,
            0,
            state,
        )
    if hyperparameters <= 2 and hyperparameters <= fits:
        why = f"{hyperparameters} hyperparameter(s) cost no more products forward than backward, exactly, in {hyperparameters} state(s), online too."
        return _made(FMD(), why, T, hyperparameters, state)
    if online:
        if T > 1 and fits >= 1:
            return _made(
                HyperDistill(),
                "λ moves during the run: one product looks over the whole horizon; fit θ with calibrate().",
                T,
                0,
                state,
            )
        return _made(
            OneStep(), "λ moves during the run, and there is no room for (or no use of) a second state.", T, 0, state
        )
    if fits >= T:
        return _made(
            RMD(),
            f"all {T} states fit, so the exact gradient costs two gradients and two products per step.",
            T,
            0,
            state,
        )
    if fits >= 1 and repeated(T, int(fits)) <= 4 * T:
        why = (
            f"{fits} of {T} states fit: exact still, with {repeated(T, int(fits))} steps run again between checkpoints."
        )
        return _made(RMD(Checkpointed(slots=int(fits), horizon=T)), why, T, 0, state)
    if fits >= 1:
        return _made(
            HyperDistill(),
            f"only {fits} of {T} states fit, and exact reversal would run each step over four times.",
            T,
            0,
            state,
        )
    return _made(OneStep(), "not one state fits beside the run itself.", T, 0, state)


def predicted_cost(estimator: Estimator, horizon: int, hyperparameters: int) -> Cost:
    """The model: exact for the estimators that :func:`suggest_estimator` gives (λ inside the inner loss; see the module's table).

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


def _made(estimator: Estimator, reason: str, T: int, hyperparameters: int, state: int) -> Suggestion:
    held = states_held(estimator, T, hyperparameters)
    return Suggestion(estimator, reason, predicted_cost(estimator, T, hyperparameters), held * state)
