"""``check``: hold an estimator to its formula and to the closed forms, or a step Φ to the contract of a step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaopt import replay, tree
from metaopt.estimators import Estimator, NotConvergedWarning, ZeroHypergradientWarning, hypergradient
from metaopt.inner.contract import Step
from metaopt.inner.state import InnerState
from metaopt.tree import Tree
from metaopt.verify.cases import CLOSED_FORMS, Problem
from metaopt.verify.formulas import formula_of
from metaopt.verify.reference import jacobians, unvector, vector

HORIZONS = (1, 2, 6)


class Row(NamedTuple):
    """One check.

    Attributes:
        case: the problem, or the property of a step.
        against: what it was compared with.
        error: relative to the reference's norm where that is above 1, else absolute.
        tolerance: what the error may be.
        note: what went wrong, or why theory makes the comparison exact.
    """

    case: str
    against: str
    error: float
    tolerance: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance (NaN is not)."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Report:
    """All checks of one estimator or step."""

    name: str
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """Whether there were checks, and all passed."""
        return bool(self.rows) and all(row.passed for row in self.rows)

    @property
    def failures(self) -> tuple[Row, ...]:
        """What did not pass."""
        return tuple(row for row in self.rows if not row.passed)

    def __repr__(self) -> str:
        """A table in plain text, failures marked."""
        head = f"{self.name}: {'passed' if self.passed else 'FAILED'}, {len(self.rows) - len(self.failures)} of {len(self.rows)} checks"
        marks = [
            f"  {'ok  ' if r.passed else 'FAIL'} {r.case:<32} {r.against:<16} {r.error:8.1e} <= {r.tolerance:.0e}  "
            f"{r.note}"
            for r in self.rows
        ]
        return "\n".join([head, *marks])


def check(
    subject: Estimator | Step,
    w: Tree = None,
    lam: Tree = None,
    batch: Any = None,
    *,
    problems: Sequence[Callable[..., Problem]] = CLOSED_FORMS,
    tolerance: float = 1e-10,
    seed: int = 0,
) -> Report:
    """Verify an estimator on the closed forms, or a step Φ at ``(w, lam, batch)``.

    Args:
        subject: an estimator (ours, a subclass, or your own), or a step.
        w: for a step: float64 weights to start from.
        lam: for a step: float64 hyperparameters.
        batch: for a step: a batch.
        problems: functions of ``(seed, horizon)`` that make the cases.
        tolerance: relative error allowed.
        seed: of the random parts.

    Raises:
        ValueError: if a step comes without weights and hyperparameters, or not in float64.

    >>> import metaopt as mo
    >>> check(mo.RMD()).passed
    True
    """
    if isinstance(subject, Estimator):
        return check_estimator(subject, problems=problems, tolerance=tolerance, seed=seed)
    return check_step(subject, w, lam, batch, tolerance=tolerance, seed=seed)


# -- estimators ----------------------------------------------------------------------------------
def check_estimator(
    estimator: Estimator, *, problems: Sequence[Callable[..., Problem]] = CLOSED_FORMS, tolerance: float, seed: int
) -> Report:
    """Its own formula on every case at horizons 1, 2 and 6.

    The closed form where it claims, or theory says, that it is exact.
    """
    rows = [row for make in problems for row in _on(make(seed=seed, horizon=max(HORIZONS)), estimator, tolerance)]
    return Report(repr(estimator), tuple(rows))


def verify_class(kind: type[Estimator], *, tolerance: float = 1e-10, seed: int = 0) -> Report:
    """The estimator as its row in :data:`metaopt.verify.formulas.ENTRIES` makes it for each case.

    Without a row it fails.
    """
    formula = formula_of(kind)
    if formula is None:
        return Report(
            kind.__name__,
            (Row("(none)", "own formula", float("inf"), tolerance, "no row in metaopt.verify.formulas.ENTRIES"),),
        )
    rows: list[Row] = []
    for make in CLOSED_FORMS:
        problem = make(seed=seed, horizon=max(HORIZONS))
        for horizon in HORIZONS:
            rows += _on(problem, formula.make(problem, horizon), tolerance, (horizon,))
    return Report(kind.__name__, tuple(rows))


def _on(problem: Problem, estimator: Estimator, tolerance: float, horizons: Sequence[int] = HORIZONS) -> list[Row]:
    formula = formula_of(estimator)
    if formula is not None and not formula.applies(problem):
        return []
    rows = []
    for horizon in horizons:
        case = f"{problem.name}, T={horizon}"
        why = (
            formula.exact_where(problem, horizon, estimator)
            if formula is not None
            else "claims to be exact"
            if estimator.exact
            else None
        )
        try:
            got = vector(_total(problem, horizon, estimator))
        except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
            rows.append(Row(case, "runs at all", float("inf"), tolerance, f"{type(error).__name__}: {error}"))
            continue
        if formula is not None:
            rows.append(
                Row(case, "own formula", _error(got, formula.hypergradient(problem, horizon, estimator)), tolerance)
            )
        if why is not None and problem.exact is not None:
            rows.append(Row(case, "closed form", _error(got, vector(problem.exact(horizon))), tolerance, why))
    return rows


def _total(problem: Problem, horizon: int, estimator: Estimator) -> Tree:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ZeroHypergradientWarning)
        warnings.simplefilter("ignore", NotConvergedWarning)  # formulas hold wherever they are evaluated
        result = hypergradient(
            problem.step,
            problem.outer_loss,
            problem.w0,
            problem.lam,
            problem.batches,
            problem.outer_batch,
            estimator=estimator,
            horizon=horizon,
        )
    return result.total


# -- steps ---------------------------------------------------------------------------------------
def check_step(step: Step, w: Tree, lam: Tree, batch: Any = None, *, tolerance: float = 1e-10, seed: int = 0) -> Report:
    """Purity, exact replay, use of λ, ``vjp`` against ``jvp``, dense Jacobians and finite differences, linearity of the pullback."""
    _check_float64(w, lam)
    state = step.init(w, lam)
    rows = [_purity(step, state, lam, batch), _replay(step, state, lam, batch)]
    if not all(row.passed for row in rows):
        return Report(_name(step), tuple(rows))  # derivatives of an impure step mean nothing
    with replay.preserved(state):
        state = step(state, lam, batch)  # a state whose slots are not all zero
        rows += _derivatives(step, state, lam, batch, tolerance, torch.Generator().manual_seed(seed))
    return Report(_name(step), tuple(rows))


def _purity(step: Step, state: InnerState, lam: Tree, batch: Any) -> Row:
    given = (state, lam, batch)
    before = tree.clone(given)
    with replay.preserved(state):
        step(state, lam, batch)
    pairs = zip(tree.names(given), tree.leaves(before), tree.leaves(given), strict=True)
    changed = [name for name, x, y in pairs if isinstance(x, Tensor) and not torch.equal(x, y)]
    return Row(
        "purity",
        "its own inputs",
        float(len(changed)),
        0.0,
        f"changed (state, lam, batch){', '.join(changed)}" if changed else "",
    )


def _replay(step: Step, state: InnerState, lam: Tree, batch: Any) -> Row:
    rng = replay.snapshot(state)
    with replay.preserved(state):
        first = step(state, lam, batch)
        replay.restore(rng)
        second = step(state, lam, batch)
    error = float((vector(first) - vector(second)).abs().max())
    note = "two calls with the same arguments and random state differ: hidden state, or randomness that does not arrive with the batch"
    return Row("replay", "a second call", error, 0.0, note if error else "")


def _derivatives(
    step: Step, state: InnerState, lam: Tree, batch: Any, tolerance: float, generator: torch.Generator
) -> list[Row]:
    rng = replay.snapshot(state)

    def again() -> None:
        replay.restore(rng)

    def noise(like: Tree) -> Tree:
        return tree.map(
            lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype) if tree.is_float(x) else x, like
        )

    def pulled(cotangent: InnerState) -> tuple[Tensor, Tree]:
        again()
        state_bar, lam_bar = step.vjp(state, lam, batch, cotangent)
        assert state_bar is not None
        return torch.cat([vector(state_bar), vector(tree.filled(lam_bar, lam))]), lam_bar

    one, two, state_dot, lam_dot = noise(state), noise(state), noise(state), noise(lam)
    # slots move by a share of themselves: a second moment is tiny, and must stay positive in the
    # differences
    state_dot = state_dot._replace(
        slots=tree.map(lambda x, dot: x.abs() * dot if tree.is_float(x) else x, state.slots, state_dot.slots)
    )
    bar, lam_bar = pulled(one)
    unused = [
        name
        for name, leaf in zip(tree.names(lam), tree.leaves(lam_bar), strict=True)
        if leaf is None or not bool(leaf.any())
    ]
    rows = [
        Row(
            "uses lam", "every leaf", float(len(unused)), 0.0, f"Φ ignores lam at {', '.join(unused)}" if unused else ""
        )
    ]
    again()
    pushed = vector(step.jvp(state, lam, batch, state_dot, lam_dot))
    dots = torch.cat([vector(state_dot), vector(lam_dot)])
    rows.append(
        Row("dot product", "vjp · x = y · jvp", _error((bar @ dots)[None], (vector(one) @ pushed)[None]), tolerance)
    )
    again()
    A, B = jacobians(step, state, lam, batch)
    rows.append(Row("vjp", "dense Jacobian", _error(bar, vector(one) @ torch.cat([A, B], 1)), tolerance))
    slope = _central(lambda: again(), step, state, lam, batch, dots)
    rows.append(Row("jvp", "differences", _error(pushed, slope), max(tolerance, 1e-6)))
    both = pulled(tree.add(tree.scale(2.0, one), two)._replace(t=state.t))[0]
    rows.append(Row("pullback", "linearity", _error(both, 2.0 * bar + pulled(two)[0]), tolerance))
    return rows


def _central(
    again: Callable[[], None], step: Step, state: InnerState, lam: Tree, batch: Any, dots: Tensor, radius: float = 1e-5
) -> Tensor:
    flat, n = torch.cat([vector(state), vector(lam)]), vector(state).numel()

    def at(point: Tensor) -> Tensor:
        again()
        return vector(step(unvector(point[:n], state), unvector(point[n:], lam), batch))

    coarse, fine = ((at(flat + h * dots) - at(flat - h * dots)) / (2 * h) for h in (radius, radius / 2))
    return fine + (fine - coarse) / 3  # extrapolated: the error is of fourth order


def _error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm().clamp_min(1.0))


def _name(step: Step) -> str:
    return f"step {getattr(getattr(step, 'fn', None), '__name__', type(step).__name__)}"


def _check_float64(w: Tree, lam: Tree) -> None:
    for what, value in (("w", w), ("lam", lam)):
        if not tree.floats(value):
            raise ValueError(f"checking a step needs {what}: verify.check(step, w, lam, batch)")
        for name, leaf in zip(tree.names(value), tree.leaves(value), strict=True):
            if tree.is_float(leaf) and leaf.dtype != torch.float64:
                raise ValueError(
                    f"{what} at {name} is {leaf.dtype}: finite differences and 1e-10 need float64, use .double()"
                )
