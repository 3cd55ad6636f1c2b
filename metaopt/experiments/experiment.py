"""What every experiment is: methods, settings, one run of each, and what is shown of the runs."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, TypeVar

from filelock import FileLock, Timeout
from rich.table import Table

from metaopt.estimators import Estimator
from metaopt.experiments.workers import run_all
from metaopt.files import write_text

FORMAT = 1
"""Version of the files in ``runs/``; another one is refused."""


class SettingError(ValueError):
    """Settings that do not fit each other, the data, or what lies in the folder.

    Attributes:
        options: what they are called on the command line.
    """

    def __init__(self, message: str, *options: str) -> None:
        super().__init__(message)
        self.options = options

    def __reduce__(self) -> tuple[Any, ...]:
        """Workers send errors to the main process."""
        return type(self), (str(self), *self.options)


Config = TypeVar("Config", bound=Any)


@dataclass(frozen=True)
class Method:
    """A row of an experiment's table. Its ``repr`` holds what its numbers depend on.

    Attributes:
        key: its name on the command line.
        title: its name in the table.
        estimator: what moves λ; ``None``: λ stays.
        paper: the published figure, or one for each model.
        settings: fields of the experiment's configuration in which this row differs.
    """

    key: str
    title: str = field(repr=False)
    estimator: Estimator | None = None
    paper: str | Mapping[str, str] = field(default="–", repr=False)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def moving(self) -> Estimator:
        """What moves λ.

        Raises:
            ValueError: for a row in which λ stays.
        """
        if self.estimator is None:
            raise ValueError(f"{self.key} has no estimator: its hyperparameters stay as they are")
        return self.estimator

    def configured(self, config: Config) -> Config:
        """The configuration of this row."""
        return replace(config, **self.settings)

    def published(self, model: str) -> str:
        """The published figure for one model."""
        return self.paper if isinstance(self.paper, str) else self.paper.get(model, "–")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of one method, in plain numbers, strings and lists; experiments add fields.

    Attributes:
        method: key of the method.
        seed: everything random follows from it.
        seconds: how long it took.
        failure: what went wrong, or "".
    """

    method: str
    seed: int
    seconds: float
    failure: str = ""


SomeRun = TypeVar("SomeRun", bound=Run)


@dataclass(frozen=True)
class Experiment(Generic[SomeRun]):
    """An experiment of a paper, as the command line sees it.

    Attributes:
        name: on the command line.
        methods: the rows of its table.
        kind: what a run gives.
        prepare: ``(method, config, seed)``; it fails where a file is missing or damaged.
        run: ``(method, config, seed) -> kind``, deterministic in its arguments.
        table: ``(methods, runs, config) -> Table``.
        draw: ``(methods, runs, config, folder) -> files written``.
        goes_on: whether ``run`` takes a folder in which it keeps where it had got to.
    """

    name: str
    methods: Sequence[Method]
    kind: type[SomeRun]
    prepare: Callable[[Method, Any, int], object]
    run: Callable[..., SomeRun]
    table: Callable[[Sequence[Method], Sequence[SomeRun], Any], Table]
    draw: Callable[[Sequence[Method], Sequence[SomeRun], Any, Path], list[Path]]
    goes_on: bool = False

    def select(self, keys: Sequence[str] | None) -> list[Method]:
        """The methods with these keys, in the table's order; all of them for ``None``.

        Raises:
            SettingError: if a key is unknown.
        """
        known = [method.key for method in self.methods]
        unknown = [key for key in keys or [] if key not in known]
        if unknown:
            listed = ", ".join(map(repr, unknown))
            raise SettingError(f"no estimator is called {listed}; there are {', '.join(known)}", "--estimators")
        return [method for method in self.methods if keys is None or method.key in keys]

    def plan(self, methods: Sequence[Method], config: Any, seeds: int, out: Path) -> list[str]:
        """What :meth:`conduct` would do, in lines; nothing is written.

        Raises:
            SettingError: if ``out`` holds runs with other settings, or a damaged file.
        """
        lines = ["settings:"]
        lines += [f"  {field.name} = {getattr(config, field.name)}" for field in fields(config)]
        lines.append(f"runs: {len(methods)} methods, {seeds} {'seeds' if seeds > 1 else 'seed'} each")
        for method in methods:
            paths = {seed: _place(out / "runs", method, seed) for seed in range(seeds)}
            finished = [seed for seed, path in paths.items() if path.exists()]
            for seed in finished:
                read(paths[seed], settings_of(method, config, seed))
            settings = "".join(f", {name} = {value}" for name, value in method.settings.items())
            lines.append(f"  {method.key}: {method.title}{settings} ({len(finished)} of {seeds} finished)")
        lines.append(f"files: {_place(out / 'runs', methods[0], 0)} and so on, after each run")
        lines.append(f"       {out / 'runs.json'} and the pictures beside it, at the end")
        return [*lines, "nothing was done (--dry-run)"]

    def conduct(
        self, methods: Sequence[Method], config: Any, seeds: int, out: Path, *, workers: int | None = None
    ) -> list[SomeRun]:
        """Every method with every seed, in parallel; each run is kept in ``out`` as soon as it has ended.

        Called again with the same ``out``, it reads the finished runs and does the others.

        Raises:
            FileNotFoundError: if the data is missing.
            ValueError: if the data is damaged, if ``out`` holds runs with other settings, or if
                another process is at work there.
        """
        out.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(out / ".lock", timeout=0):
                self.prepare(methods[0], config, 0)
                once = functools.partial(finished_or_run, self, out / "runs")
                runs = run_all(once, methods, config, seeds, workers=workers)
        except Timeout as error:
            raise SettingError(
                f"another process is at work in {out}; wait for it, or choose another folder", "--out"
            ) from error
        save(runs, config, out / "runs.json")
        return runs


def finished_or_run(experiment: Experiment[SomeRun], folder: Path, method: Method, config: Any, seed: int) -> SomeRun:
    """One run, or what an earlier call found.

    Raises:
        ValueError: if the folder holds that run with other settings, or a damaged file.
    """
    path = _place(folder, method, seed)
    settings = settings_of(method, config, seed)
    if path.exists():
        return experiment.kind(**read(path, settings)["run"])
    run = experiment.run(method, config, seed, folder) if experiment.goes_on else experiment.run(method, config, seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"settings": settings, "run": asdict(run)}) + "\n")
    return run


def _place(folder: Path, method: Method, seed: int) -> Path:
    return folder / f"{method.key}-{seed}.json"


def settings_of(method: Method, config: Any, seed: int) -> dict[str, Any]:
    """All that a run's numbers depend on, as JSON gives it back."""
    found = {
        "format": FORMAT,
        "metaopt": version("torch-metaopt"),
        "torch": version("torch"),
        "seed": seed,
        "method": repr(method),
        **asdict(config),
    }
    return json.loads(json.dumps(found, default=str))


def read(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of a run's file.

    Raises:
        ValueError: if it is damaged, or was made with other settings.
    """
    try:
        found = json.loads(path.read_text())
        earlier = found["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise SettingError(f"{path} is damaged ({error}); remove it, and the run is done again", "--out") from error
    check_settings(path, earlier, settings)
    return found


def check_settings(path: Path, earlier: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse a file that was made with other settings.

    Raises:
        ValueError: with the settings that differ.
    """
    different = [
        f"{key}: {earlier.get(key)!r} there, {value!r} here"
        for key, value in settings.items()
        if earlier.get(key) != value
    ]
    if different:
        raise SettingError(
            f"{path} holds a run with other settings ({'; '.join(different)}); choose another folder, or remove it",
            "--out",
        )


def save(runs: Sequence[Run], config: Any, path: Path) -> None:
    """Every run and the settings, as JSON (NaN and infinities as ``null``)."""
    plain = {"config": asdict(config), "runs": [_without_nan(asdict(run)) for run in runs]}
    write_text(path, json.dumps(plain, indent=1, allow_nan=False, default=str) + "\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
