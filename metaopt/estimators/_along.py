"""Several states of one run: outer losses, or cotangents, along its way and not only at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from metaopt import tree
from metaopt.estimators._arguments import check_several
from metaopt.estimators.base import Estimator, Response, Terms
from metaopt.estimators.outer import OuterLoss, OuterObjective
from metaopt.inner.contract import Step
from metaopt.inner.state import InnerState
from metaopt.tree import Tree


def check_at(at: Sequence[int], estimator: Estimator) -> tuple[int, ...]:
    """The steps, in order.

    Raises:
        ValueError: if they are not increasing numbers from 1 on, or the estimator follows one outer
            loss along the run.
    """
    steps = tuple(at)
    numbers = all(isinstance(t, int) and t >= 1 for t in steps)
    if not steps or not numbers or list(steps) != sorted(set(steps)):
        raise ValueError(f"at must be increasing numbers of steps, 1 ... T, got {at!r}")
    if estimator.needs_outer_loss:
        raise ValueError(
            f"{type(estimator).__name__} follows one outer loss along the run, so it has no answer for several: "
            "leave at out, or use RMD"
        )
    return steps


def along(outer_loss: OuterLoss, outer_batch: Any, at: tuple[int, ...]) -> dict[int, OuterObjective]:
    """The outer loss of each step.

    Raises:
        TypeError: if ``outer_batch`` is not one batch for each step.
    """
    if callable(outer_batch):
        return {t: OuterObjective(outer_loss, outer_batch(t), look=t == at[0]) for t in at}
    check_several(outer_batch, "outer_batch")
    if not isinstance(outer_batch, Sequence) or len(outer_batch) != len(at):
        raise TypeError(
            f"with at={at}, outer_batch is a sequence of {len(at)} batches, one for each step, or a function "
            f"t -> batch; got {type(outer_batch).__name__}"
        )
    return {t: OuterObjective(outer_loss, batch, look=t == at[0]) for t, batch in zip(at, outer_batch, strict=True)}


def run_to(
    step: Step, state: InnerState, lam: Tree, batches: Iterator[Any], estimator: Estimator, at: Sequence[int]
) -> Iterator[tuple[int, InnerState, Any]]:
    """The run as far as the last of the steps; ``(t, state, carry)`` at each of them.

    Raises:
        ValueError: if the run does not come to one of them.
    """
    first = state.t
    waiting = list(at)
    carry = estimator.init(step, state, lam)
    for batch in batches:
        state, carry = estimator.advance(step, state, lam, batch, carry)
        if state.t - first == waiting[0]:
            yield waiting.pop(0), state, carry
        if not waiting:
            return
    raise ValueError(
        f"at asks for step {waiting[0]}, but the run has {state.t - first} steps (it is counted in steps also where "
        "several are taken at once)"
    )


def terms_along(
    step: Step,
    outers: Mapping[int, OuterObjective],
    state: InnerState,
    lam: Tree,
    batches: Iterator[Any],
    estimator: Estimator,
) -> tuple[InnerState, Terms]:
    """The run, and the two terms of the sum of the outer losses."""
    visits = run_to(step, state, lam, batches, estimator, list(outers))
    if not estimator.one_sweep:
        parts: list[Terms] = []
        for t, state, _carry in visits:
            parts.append(estimator.differentiate(step, outers[t], state, lam, _carry))
        return state, _summed(parts)
    alphas: dict[int, InnerState] = {}
    parts = []
    carry = None
    for t, state, carry in visits:  # noqa: B007
        loss, alpha, direct = outers[t].gradient(state.w, lam)
        alphas[state.t] = InnerState(alpha, None, state.t)
        parts.append(Terms(loss, direct, tree.map(lambda _: None, lam)))
    response = estimator.pull(step, state, lam, carry, alphas)
    return state, _summed(parts)._replace(indirect=response.lam, initial=response.initial)


def responses_along(
    step: Step, state: InnerState, lam: Tree, batches: Iterator[Any], estimator: Estimator, at: Sequence[int]
) -> tuple[list[InnerState], Callable[[Mapping[int, InnerState]], Response]]:
    """The states at some steps, and the pullback of cotangents of all of them, by their number ``t``.

    Raises:
        ValueError: for an estimator that would answer for the whole run at each of them.
    """
    if not estimator.one_sweep and not estimator.online:
        raise ValueError(
            f"{estimator!r} answers for a whole run and not for steps on its way: leave at out, or use RMD"
        )
    reached: list[InnerState] = []
    pullbacks: dict[int, Callable[[Any], Response]] = {}
    carry = None
    for _, state, carry in run_to(step, state, lam, batches, estimator, at):  # noqa: B020
        point = state.w
        if not estimator.one_sweep:
            point, pullbacks[state.t] = estimator.respond(step, state, lam, carry)
        reached.append(tree.detach(state._replace(w=point)))
    last = state
    if estimator.one_sweep:
        return reached, lambda cotangents: estimator.pull(step, last, lam, carry, cotangents)

    def pullback(cotangents: Mapping[int, InnerState]) -> Response:
        found = [pullbacks[t](as_taken(estimator, cotangent)) for t, cotangent in cotangents.items()]
        total = Response(found[0].lam, found[0].initial)
        for other in found[1:]:
            initial = _added(total.initial, other.initial)
            total = Response(tree.add(total.lam, other.lam), initial)
        return total

    return reached, pullback


def as_taken(estimator: Estimator, cotangent: InnerState) -> Any:
    """The cotangent as the estimator takes it."""
    if estimator.whole_state:
        return cotangent
    if cotangent.slots is not None:
        raise RuntimeError(
            f"a loss depends on the optimiser's slots (momentum, averages) or buffers of the state, and "
            f"{type(estimator).__name__} has no pullback for these: use only state.w, or RMD"
        )
    return cotangent.w


def _summed(parts: list[Terms]) -> Terms:
    total = parts[0]
    for part in parts[1:]:
        total = Terms(
            total.outer_loss + part.outer_loss,
            tree.add(total.direct, part.direct),
            tree.add(total.indirect, part.indirect),
            _added(total.initial, part.initial),
            part.info,
        )
    return total


def _added(a: InnerState | None, b: InnerState | None) -> InnerState | None:
    """The sum of two cotangents of the first state; unknown if one of them is."""
    if a is None or b is None:
        return None
    slots = b.slots if a.slots is None else a.slots if b.slots is None else tree.add(a.slots, b.slots)
    return a._replace(w=tree.add(a.w, b.w), slots=slots)
