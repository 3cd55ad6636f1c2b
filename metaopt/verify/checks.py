"""``check``: hold an estimator to its formula and to the closed forms, or a step Φ to the contract of a step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from metaopt.estimators import Estimator, NotConvergedWarning, ZeroHypergradientWarning
from metaopt.estimators.hypergradient import opened
from metaopt.inner.contract import Step
from metaopt.problem import Problem
from metaopt.tree import Tree, vector
from metaopt.verify.case import Case
from metaopt.verify.cases import CLOSED_FORMS
from metaopt.verify.formulas import Formula, WholeFormula, formula_of
from metaopt.verify.reference import through_loop
from metaopt.verify.report import Report, Row, relative_error
from metaopt.verify.steps import check_step

HORIZONS = (1, 2, 6)


def check(
    subject: Estimator | Step | Problem,
    w: Tree = None,
    lam: Tree = None,
    batch: Any = None,
    *,
    problem: Problem | None = None,
    problems: Sequence[Callable[..., Case]] = CLOSED_FORMS,
    tolerance: float = 1e-10,
    seed: int = 0,
) -> Report:
    """Verify an estimator on the closed forms or on a problem, or a step Φ at ``(w, lam, batch)``.

    Args:
        subject: an estimator (ours, a subclass, or your own), a step, or a problem, whose step is
            verified at its first batch.
        w: for a step: float64 weights to start from.
        lam: for a step: float64 hyperparameters.
        batch: for a step: a batch.
        problem: for an estimator that is exact: a problem, in place of the closed forms; the
            reference is autograd through the loop.
        problems: functions of ``(seed, horizon)`` that make the cases.
        tolerance: relative error allowed.
        seed: of the random parts.

    Returns:
        A report; ``.passed`` is false where nothing could be compared, and the report says why.

    Raises:
        ValueError: if a step comes without weights and hyperparameters, or not in float64.

    >>> import metaopt as mo
    >>> check(mo.RMD()).passed
    True
    """
    if isinstance(subject, Problem):
        _, stream = opened(subject.batches, subject.horizon, subject.step.steps_at_once)
        first = next(stream)
        return check_step(subject.step, subject.w0, subject.lam, first, tolerance=tolerance, seed=seed)
    if isinstance(subject, Estimator) and problem is not None:
        return check_on(problem, subject, tolerance)
    if isinstance(subject, Estimator):
        return check_estimator(subject, problems=problems, tolerance=tolerance, seed=seed)
    return check_step(subject, w, lam, batch, tolerance=tolerance, seed=seed)


def check_estimator(
    estimator: Estimator, *, problems: Sequence[Callable[..., Case]] = CLOSED_FORMS, tolerance: float, seed: int
) -> Report:
    """Hold an estimator to its own formula on every case at horizons 1, 2 and 6.

    It is also held to the closed form where it claims, or theory says, that it is exact.
    """
    rows: list[Row] = []
    skipped: list[str] = []
    for make in problems:
        problem = make(seed=seed, horizon=max(HORIZONS))
        reason = _why_not(estimator, problem)
        if reason is None:
            for horizon in HORIZONS:
                rows += _on(problem, estimator, horizon, tolerance)
        else:
            skipped.append(f"{problem.name}: {reason}")
    return Report(repr(estimator), tuple(rows), tuple(skipped))


def check_on(problem: Problem, estimator: Estimator, tolerance: float) -> Report:
    """Hold an estimator to autograd through the loop of one problem."""
    name = f"{estimator!r} on {problem!r}"
    if not estimator.exact:
        reason = f"{estimator!r} is an approximation here: mo.diagnose.compare measures how close it comes"
        return Report(name, rows=(), skipped=(reason,))

    got = vector(problem.hypergradient(estimator).total)
    want = vector(through_loop(problem, problem.T))
    error = relative_error(got, want)
    row = Row(f"T = {problem.T}", "autograd through the loop", error, tolerance)
    return Report(name, rows=(row,))


def class_rows(kind: type[Estimator], *, tolerance: float = 1e-10, seed: int = 0) -> Iterator[Row]:
    """Hold an estimator's class to its formula on every case.

    Its row in :data:`metaopt.verify.formulas.ENTRIES` makes the estimators. A class without a row
    fails.
    """
    formula = formula_of(kind)
    if formula is None:
        note = f"{kind.__name__} has no row in metaopt.verify.formulas.ENTRIES"
        yield Row("(none)", "own formula", float("inf"), tolerance, note)
        return
    for make in CLOSED_FORMS:
        problem = make(seed=seed, horizon=max(HORIZONS))
        for horizon in HORIZONS:
            estimator = formula.make(problem, horizon)
            if _why_not(estimator, problem) is None:
                yield from _on(problem, estimator, horizon, tolerance)


def _why_not(estimator: Estimator, problem: Case) -> str | None:
    """Why there is nothing to hold the estimator to on this problem; ``None`` where there is."""
    formula = formula_of(estimator)
    if formula is not None:
        return formula.unless(problem)
    name = type(estimator).__name__
    if not estimator.exact:
        return (
            f"{name} has no formula and does not claim to be exact: "
            f"add metaopt.verify.formulas.ENTRIES[{name}] = Formula(...), or declare exact = True"
        )
    return None if problem.exact is not None else "this problem has no closed form"


def _on(problem: Case, estimator: Estimator, horizon: int, tolerance: float) -> list[Row]:
    """One estimator on one problem at one horizon."""
    formula = formula_of(estimator)
    case = f"{problem.name}, T={horizon}"
    try:
        got = vector(_total(problem, horizon, estimator))
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        note = f"{type(error).__name__}: {error}"
        return [Row(case, "runs at all", float("inf"), tolerance, note)]

    rows = []
    if formula is not None:
        own = formula.hypergradient(problem, horizon, estimator)
        error = relative_error(got, own)
        rows.append(Row(case, "own formula", error, tolerance))

    why = _exact_here(formula, problem, horizon, estimator)
    if why is not None and problem.exact is not None:
        closed = vector(problem.exact(horizon))
        error = relative_error(got, closed)
        rows.append(Row(case, "closed form", error, tolerance, why))
    return rows


def _exact_here(
    formula: Formula | WholeFormula | None, problem: Case, horizon: int, estimator: Estimator
) -> str | None:
    """Why the estimator is exact on this problem, if it is."""
    if formula is not None:
        return formula.exact_where(problem, horizon, estimator)
    return "claims to be exact" if estimator.exact else None


def _total(problem: Case, horizon: int, estimator: Estimator) -> Tree:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ZeroHypergradientWarning)
        warnings.simplefilter("ignore", NotConvergedWarning)  # formulas hold wherever they are evaluated
        result = replace(problem, horizon=horizon).hypergradient(estimator)
    return result.total
