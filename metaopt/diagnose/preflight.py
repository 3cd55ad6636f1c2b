"""Before a long run: two steps that tell what will work, what will not, and what it will take."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from metaopt import tree
from metaopt.diagnose.alignment import closeness
from metaopt.diagnose.results import Result
from metaopt.estimators import RMD, Estimator, ForwardGradient
from metaopt.estimators.hypergradient import each
from metaopt.inner import ForwardOverReverse, InnerStep
from metaopt.problem import Problem
from metaopt.trajectory import Checked, Checkpointed, Full, Graphs
from metaopt.verify.memory import peak_bytes

SLOTS = 17


class Look(NamedTuple):
    """One thing that was tried.

    Attributes:
        what: in words.
        good: whether it works as one would wish.
        found: what came out: a number, a warning, an error.
        remedy: what to do where it is not good.
    """

    what: str
    good: bool
    found: str
    remedy: str = ""


class Forecast(NamedTuple):
    """What a trajectory will take for all T steps, from two and four steps of it.

    Attributes:
        trajectory: its name.
        bytes: peak of what torch allocates during run and sweep.
        seconds: of one hypergradient.
    """

    trajectory: str
    bytes: float
    seconds: float


@dataclass(frozen=True, repr=False)
class Preflight(Result):
    """What :func:`preflight` returns.

    Attributes:
        problem: its name.
        horizon: T.
        looks: what was tried.
        forecasts: one per trajectory.
    """

    problem: str
    horizon: int
    looks: tuple[Look, ...]
    forecasts: tuple[Forecast, ...]

    @property
    def good(self) -> bool:
        """Whether everything that was tried is."""
        return all(look.good for look in self.looks)

    @property
    @override
    def title(self) -> str:
        bad = sum(not look.good for look in self.looks)
        return f"{self.problem}: preflight, T = {self.horizon}, {bad or 'nothing'} to mend"

    @override
    def rows(self) -> list[dict[str, Any]]:
        rows = []
        for look in self.looks:
            verdict = "ok" if look.good else "LOOK"
            rows.append({"what": look.what, "": verdict, "found": look.found, "remedy": look.remedy})
        for forecast in self.forecasts:
            what = f"RMD over {forecast.trajectory}, T = {self.horizon}"
            found = f"{forecast.bytes / 2**20:.1f} MiB, {forecast.seconds:.2g} s"
            rows.append({"what": what, "": "forecast", "found": found, "remedy": ""})
        return rows

    @override
    def draw(self, axes: Any) -> None:
        names = [forecast.trajectory for forecast in self.forecasts]
        axes.bar(names, [forecast.bytes / 2**20 for forecast in self.forecasts])
        axes.set_ylabel("MiB, forecast")


def preflight(problem: Problem) -> Preflight:
    """Try two inner steps in every way, and forecast bytes and seconds of all T.

    Which derivatives there are (reverse, mixed and forward mode), whether a replay gives the same
    numbers to the bit, which weights get no gradient, whether bfloat16 autocast keeps the direction of
    the hypergradient, and what each trajectory will take.

    Cost: some twenty hypergradients over two or four steps. Nothing of the problem is changed.

    >>> import metaopt as mo
    >>> preflight(mo.verify.cases.log_l2(horizon=50)).good
    True
    """
    batches = list(itertools.islice(each(problem.batches, problem.horizon), 4))
    few = replace(problem, batches=batches, horizon=None)
    short = replace(few, batches=batches[:2])
    looks = [
        *_reverse(short),
        _tried("mixed mode (forward over reverse)", lambda: _mixed(short), "keep mo.inner.ReverseOverReverse()"),
        _tried("forward mode (FMD, ForwardGradient)", lambda: _total(short, ForwardGradient()), "use RMD"),
        _tried(
            "a replay is the same to the bit",
            lambda: _total(short, RMD(Checked(Full()))),
            "RMD(mo.trajectory.Graphs()) replays nothing",
        ),
        _bfloat16(short),
    ]
    return Preflight(problem.name, problem.T, tuple(looks), tuple(_forecasts(few, problem.T)))


def _total(problem: Problem, estimator: Estimator) -> Tensor:
    return tree.vector(problem.hypergradient(estimator).total)


def _tried(what: str, call: Callable[[], Any], remedy: str) -> Look:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call()
        except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
            return Look(what, False, _line(error), remedy)
    told = [_line(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    return Look(what, not told, told[0] if told else "works", remedy if told else "")


def _line(said: Any) -> str:
    first = str(said).strip().splitlines()[0]
    return first if len(first) <= 100 else first[:99] + "…"


def _reverse(problem: Problem) -> list[Look]:
    """The exact gradient of two steps, and which weights its inner loss reaches."""
    found = _tried("exact reverse mode", lambda: _total(problem, RMD(Graphs())), "see the message")
    if "gives no gradient to the weights" not in found.found:
        return [found, Look("every weight gets a gradient", True, "yes")]
    remedy = "call model(w, x); freeze what is not trained"
    return [found._replace(good=True, found="works"), Look("every weight gets a gradient", False, found.found, remedy)]


def _mixed(problem: Problem) -> None:
    step = problem.step
    if isinstance(step, InnerStep):
        _total(replace(problem, step=replace(step, adjoint=ForwardOverReverse())), RMD())


def _bfloat16(problem: Problem) -> Look:
    what = "bfloat16 autocast keeps the direction"
    device = tree.floats(problem.lam)[0].device.type
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            plain = _total(problem, RMD())
            with torch.autocast(device, torch.bfloat16):
                rounded = _total(problem, RMD())
        except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
            return Look(what, False, _line(error), "stay in float32")
    cosine = closeness(rounded.double(), plain.double()).cosine
    return Look(what, cosine > 0.9, f"cosine {cosine:.3f}", "" if cosine > 0.9 else "stay in float32")


def _forecasts(problem: Problem, horizon: int) -> list[Forecast]:
    """Peak and time of two steps and of four, carried on to T; checkpoints stop growing at their slots."""
    device = tree.floats(problem.w0)[0].device
    runs = [replace(problem, batches=problem.batches[:n]) for n in (2, 4)]
    found = []
    for name, estimator, held in (
        ("Full", RMD(), horizon),
        ("Graphs", RMD(Graphs()), horizon),
        (f"Checkpointed({SLOTS})", RMD(Checkpointed(SLOTS)), min(SLOTS, horizon)),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            try:
                one, two = [peak_bytes(lambda run=run: _total(run, estimator), device) for run in runs]  # noqa: B023
                first, second = [_seconds(run, estimator) for run in runs]
            except (ArithmeticError, RuntimeError, TypeError, ValueError):
                continue  # what is wrong stands among the looks
        seconds = first + (horizon - 2) / 2 * max(second - first, 0.0)
        again = 2.0 if held < horizon else 1.0  # steps run again between checkpoints
        found.append(Forecast(name, one + (held - 2) / 2 * max(two - one, 0), again * seconds))
    return found


def _seconds(problem: Problem, estimator: Estimator) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        _total(problem, estimator)
        times.append(time.perf_counter() - start)
    return min(times)
