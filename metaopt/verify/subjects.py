"""Everything that ``metaopt verify`` verifies, cheapest first; what has no row anywhere fails by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

from metaopt import estimators, linsolve, optim, trajectory
from metaopt.estimators import Estimator
from metaopt.verify.checks import class_rows
from metaopt.verify.parts import optimizer_rows, solver_rows
from metaopt.verify.report import Row
from metaopt.verify.runs import step_rows, trajectory_rows
from metaopt.verify.tables import OPTIMIZERS, SOLVERS, TRAJECTORIES


class Subject(NamedTuple):
    """One thing to verify.

    Attributes:
        room: where it lives.
        name: what it is called there.
        rows: its comparisons, made while they are asked for.
    """

    room: str
    name: str
    rows: Callable[[], Iterator[Row]]

    def guarded(self) -> Iterator[Row]:
        """The comparisons; an error on the way is a comparison that failed."""
        try:
            yield from self.rows()
        except Exception as error:  # any error of what is verified
            yield Row("(an error)", "runs at all", float("inf"), 0.0, f"{type(error).__name__}: {error}")


def subjects() -> list[Subject]:
    """Solvers, ways through a step, estimators, trajectories, optimisers."""
    solvers = _public(linsolve, "solve", ["Solver"])
    optimizers = _public(optim, "update", ["Optimizer", "Wrapper", "PerTask"])
    trajectories = _public(trajectory, "moments", ["Trajectory", "Interpolated"])  # the last one is DrMAD's
    found = [_subject("linsolve", name, SOLVERS, solver_rows) for name in solvers]
    found += [Subject("inner", name, rows) for name, rows in step_rows().items()]
    found += [_subject("optim", name, OPTIMIZERS, optimizer_rows) for name in optimizers]
    found += [Subject("estimators", name, _rows_of(kind)) for name, kind in public_estimators().items()]
    found += [_subject("trajectory", name, TRAJECTORIES, trajectory_rows) for name in trajectories]
    return found


def _public(room: ModuleType, method: str, without: list[str]) -> list[str]:
    """Names of a room's classes that have the method, bases aside."""
    names = []
    for name in room.__all__:
        value = getattr(room, name)
        if name not in without and isinstance(value, type) and hasattr(value, method):
            names.append(name)
    return names


def _subject(room: str, name: str, table: list[Any], rows: Callable[[str], Iterator[Row]]) -> Subject:
    known = {case.name.split(",")[0] for case in table}
    if name in known:
        return Subject(room, name, lambda: rows(name))
    missing = Row("(none)", "its row", float("inf"), 0.0, f"{name} has no row in metaopt.verify.tables")
    return Subject(room, name, lambda: iter([missing]))


def _rows_of(kind: type[Estimator]) -> Callable[[], Iterator[Row]]:
    return lambda: class_rows(kind)


def public_estimators() -> dict[str, type[Estimator]]:
    """The concrete estimators at the front door, by name."""
    found = {}
    for name in estimators.__all__:
        value = getattr(estimators, name)
        if isinstance(value, type) and issubclass(value, Estimator) and value is not Estimator:
            found[name] = value
    return found
