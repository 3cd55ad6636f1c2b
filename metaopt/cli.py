"""The command line: ``metaopt compare EXPERIMENT``, ``metaopt diagnose EXPERIMENT`` and ``metaopt verify``."""

from __future__ import annotations

import inspect
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from metaopt import __version__
from metaopt.experiments import (
    diagnose,
    diagnose_many_shot,
    diagnose_sinusoid,
    many_shot_report,
    many_shot_settings,
    noisy_labels,
    noisy_labels_report,
    options,
    rotation,
    sinusoid,
)
from metaopt.experiments.experiment import Experiment, SettingError
from metaopt.experiments.image_data import Source
from metaopt.experiments.pictures import show
from metaopt.verify import command

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Differentiate through training: compare estimators, verify them."
)
compare_app = typer.Typer(help="Run an experiment with several estimators side by side.")
app.add_typer(compare_app, name="compare")
diagnose_app = typer.Typer(help="How close each estimator's hypergradients are to the exact ones.")
app.add_typer(diagnose_app, name="diagnose")

TIMES: Mapping[str, Mapping[str, str]] = {
    "compare": {
        "sinusoid": "3 min",
        "anil": "weeks; --small: 2 h",
        "warpgrad": "weeks; --small: 2 h",
        "meta-weight-net": "weeks; --small: 2 h",
        "noisy-labels": "10 min",
        "rotation": "8 min",
    },
    "diagnose": {"warpgrad": "hours; --small: 15 min", "sinusoid": "2 min"},
}
"""How long each experiment takes on two cores with its default options.

Both on sinusoids are measured; the others are estimated from a part of the work."""


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"metaopt {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@compare_app.callback(invoke_without_command=True)
def _list_comparisons(context: typer.Context) -> None:
    _list(context, "compare", compare_app)


@diagnose_app.callback(invoke_without_command=True)
def _list_diagnoses(context: typer.Context) -> None:
    _list(context, "diagnose", diagnose_app)


def _list(context: typer.Context, group: str, commands: typer.Typer) -> None:
    """A line for each experiment, where none is named."""
    if context.invoked_subcommand is not None:
        return
    typer.echo(f"metaopt {group} EXPERIMENT; the options of each: metaopt {group} EXPERIMENT --help\n")
    for found in commands.registered_commands:
        assert found.name and found.callback
        summary = inspect.cleandoc(found.help or found.callback.__doc__ or "").splitlines()[0]
        typer.echo(f"  {found.name:<17}{summary:<38} {TIMES[group][found.name]}")
    typer.echo("\nTimes on two cores with the default options; all but those of sinusoid are estimates.")


# -- compare -------------------------------------------------------------------------------------
class Job(NamedTuple):
    """What all comparisons are asked for."""

    estimators: str | None
    seeds: int
    out: Path
    workers: int | None
    dry_run: bool


def _command(name: str, experiment: Experiment[Any], summary: str | None = None) -> Callable[..., Any]:
    """``metaopt compare NAME``; its help lists the estimators."""
    listed = ", ".join(f"{method.key} ({method.title})" for method in experiment.methods)
    return compare_app.command(name, help=summary, epilog=f"Estimators: {listed}.")


@_command("sinusoid", sinusoid.EXPERIMENT)
def compare_sinusoid(
    estimators: options.Estimators = None,
    meta_iterations: Annotated[int, typer.Option(min=1, max=49_999, help="Inner runs of meta-training (M).")] = 30,
    seeds: options.Seeds = 5,
    out: options.Out = Path("results/sinusoid"),
    clip_norm: Annotated[
        float, typer.Option(callback=options.number(0), help="Bound on each hypergradient's norm; 0 for none.")
    ] = 1.0,
    exact_momentum: Annotated[
        bool, typer.Option("--exact-momentum", help="Differentiate through the momentum buffer, for every method.")
    ] = False,
    workers: options.Workers = None,
    dry_run: options.DryRun = False,
) -> None:
    """ANIL on sinusoids.

    Table 4 and figure 8 of the HyperDistill paper.
    """
    config = sinusoid.SinusoidConfig(
        meta_iterations=meta_iterations, clip_norm=clip_norm or None, constant_momentum=not exact_momentum
    )
    _compare(sinusoid.EXPERIMENT, config, Job(estimators, seeds, out, workers, dry_run))


def _many_shot_command(model: str, default: Sequence[str], summary: str) -> None:
    """Add ``metaopt compare MODEL``; the models share their options."""

    @_command(model, many_shot_report.EXPERIMENT, summary)
    def compare_many_shot(
        data: options.Data = "glyphs",
        root: options.Root = Path("data"),
        small: options.Small = False,
        estimators: options.Estimators = None,
        seeds: options.Seeds = 5,
        meta_iterations: options.Iterations = None,
        shots: options.Shots = None,
        ways: options.Ways = None,
        size: options.Size = None,
        fomaml: options.Fomaml = False,
        stable: options.Stable = True,
        download: options.Download = False,
        out: options.Out = Path("results") / model,
        workers: options.Workers = None,
        dry_run: options.DryRun = False,
    ) -> None:
        source = Source(data, root, size, download)
        config = many_shot_settings.configure(
            model,
            source,
            small=small,
            stable=stable,
            fomaml=fomaml,
            meta_iterations=meta_iterations,
            shots=shots,
            ways=ways,
        )
        chosen = ",".join(default) if estimators is None else estimators
        _compare(many_shot_report.EXPERIMENT, config, Job(chosen, seeds, out, workers, dry_run))


_many_shot_command(
    "anil", many_shot_settings.TABLE_2, "ANIL on images.\n\nMany-shot tasks: table 2 of the HyperDistill paper."
)
_many_shot_command(
    "warpgrad",
    many_shot_settings.TABLE_2,
    "WarpGrad on images.\n\nMany-shot tasks: tables 2 and 6, figures 2, 4-6 and 11-13 of the HyperDistill paper.",
)
_many_shot_command(
    "meta-weight-net",
    many_shot_settings.TABLE_2_WEIGHTS,
    "MetaWeightNet on images.\n\n"
    "Many-shot tasks with 40 % random labels: table 2 and figure 7 of the HyperDistill paper.",
)


@_command("noisy-labels", noisy_labels_report.EXPERIMENT)
def compare_noisy_labels(
    root: Annotated[
        Path, typer.Option(help="Folder that holds FashionMNIST/raw/ with the four unpacked files.")
    ] = Path("data"),
    estimators: options.Estimators = None,
    seeds: options.Seeds = 3,
    steps: Annotated[int, typer.Option(min=1, help="Training steps (T).")] = 2_000,
    examples: Annotated[int, typer.Option(min=1, help="Training images.")] = 10_000,
    clean: Annotated[int, typer.Option(min=1, help="Clean images of the outer loss.")] = 1_000,
    rate: Annotated[float, typer.Option(callback=options.number(0, 1), help="Share of wrong labels.")] = 0.4,
    download: options.Download = False,
    out: options.Out = Path("results/noisy-labels"),
    workers: options.Workers = None,
    dry_run: options.DryRun = False,
) -> None:
    """MetaWeightNet against wrong labels.

    EvoGrad's experiment, HyperDistill's figure 7 and two-stage training.
    """
    config = noisy_labels.NoisyLabelsConfig(
        root, download, examples, clean, rate, steps=steps, evaluate_every=max(1, steps // 20)
    )
    _compare(noisy_labels_report.EXPERIMENT, config, Job(estimators, seeds, out, workers, dry_run))


@_command("rotation", rotation.EXPERIMENT)
def compare_rotation(
    data: options.Data = "mnist",
    root: options.Root = Path("data"),
    size: Annotated[int, typer.Option(min=16, max=512, help="Height and width to work at.")] = 28,
    estimators: options.Estimators = None,
    seeds: options.Seeds = 3,
    epochs: Annotated[int, typer.Option(min=1, help="Times through the training images.")] = 20,
    train: Annotated[int, typer.Option(min=1, help="Upright training images.")] = 3_000,
    validation: Annotated[int, typer.Option(min=1, help="Turned images of the outer loss.")] = 1_000,
    test: Annotated[int, typer.Option(min=1, help="Turned test images.")] = 1_000,
    degrees: Annotated[
        float, typer.Option(callback=options.number(-360, 360), help="Angle of the validation and test images.")
    ] = 30.0,
    download: options.Download = False,
    out: options.Out = Path("results/rotation"),
    workers: options.Workers = None,
    dry_run: options.DryRun = False,
) -> None:
    """The angle of turned images.

    EvoGrad's experiment.
    """
    if data == "glyphs":
        raise typer.BadParameter("glyphs are not for this experiment; take mnist or a folder", param_hint="--data")
    config = rotation.RotationConfig(Source(data, root, size, download), degrees, train, validation, test, epochs)
    _compare(rotation.EXPERIMENT, config, Job(estimators, seeds, out, workers, dry_run))


def _compare(experiment: Experiment[Any], config: Any, job: Job) -> None:
    """Run what has not been run yet, then print the table and say what was written."""
    keys = None if job.estimators is None else [key.strip() for key in job.estimators.split(",")]
    out = job.out
    with _guarded(f"what has finished is kept in {out}. To go on"):
        methods = experiment.select(keys)
        if job.dry_run:
            typer.echo("\n".join(experiment.plan(methods, config, job.seeds, out)))
            return
        _make(out)
        runs = experiment.conduct(methods, config, job.seeds, out, workers=job.workers)
        written = [*experiment.draw(methods, runs, config, out), out / "runs.json"]
    show(experiment.table(methods, runs, config))
    typer.echo(f"{job.seeds} seed{'s' if job.seeds > 1 else ''}; options: {config.options}")
    for method in methods:
        if method.configured(config).options != config.options:
            typer.echo(f"  except {method.title}: {method.configured(config).options}")
    for run in runs:
        if run.failure:
            typer.echo(f"failed: {run.method}, seed {run.seed}: {run.failure}")
    _echo_written(written)


@contextmanager
def _guarded(kept: str) -> Iterator[None]:
    """Errors in the words of the command line; after Ctrl-C how to go on."""
    again = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    try:
        yield
    except SettingError as error:
        raise typer.BadParameter(str(error), param_hint=" / ".join(error.options)) from error
    except FileNotFoundError as error:
        raise typer.BadParameter(str(error), param_hint="--root") from error
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise typer.BadParameter(str(error)) from error
    except BrokenExecutor:
        typer.echo(f"\na worker was killed, perhaps for its memory; {kept}, with fewer --workers: {again}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo(f"\nstopped; {kept}: {again}", err=True)
        raise typer.Exit(130) from None


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingError(str(error), "--out") from error


def _echo_written(paths: Sequence[Path]) -> None:
    typer.echo("wrote " + ", ".join(str(path) for path in paths))


# -- diagnose ------------------------------------------------------------------------------------
@diagnose_app.command("warpgrad")
def diagnose_on_warpgrad(
    data: options.Data = "glyphs",
    root: options.Root = Path("data"),
    small: options.Small = False,
    meta_iterations: options.Iterations = None,
    shots: options.Shots = None,
    ways: options.Ways = None,
    size: options.Size = None,
    stable: options.Stable = True,
    finished: Annotated[
        Path | None,
        typer.Option(
            callback=options.state_file,
            help="State file of a finished run, for a second look: results/warpgrad/runs/….pt.",
        ),
    ] = None,
    problems: options.Problems = 2,
    every: options.Every = 25,
    out: options.Out = Path("results/diagnose-warpgrad"),
) -> None:
    """WarpGrad on images, against exact RMD.

    Cosine to exact RMD along the inner run, and HyperDistill's calibration: figures 3 and 4 of the
    HyperDistill paper.
    """
    config = many_shot_settings.configure(
        "warpgrad",
        Source(data, root, size),
        small=small,
        stable=stable,
        meta_iterations=meta_iterations,
        shots=shots,
        ways=ways,
    )
    with _guarded("nothing was kept. To start again"):
        _make(out)
        stages = diagnose_many_shot.run(config, out, finished=finished, problems=problems, every=every)
    _diagnosed(stages, f"WarpGrad on {data}, T = {config.horizon}", problems, out)


@diagnose_app.command("sinusoid")
def diagnose_on_sinusoid(
    meta_iterations: Annotated[
        int, typer.Option(min=1, max=19_999, help="Inner runs of meta-training before the second look.")
    ] = 30,
    problems: options.Problems = 4,
    every: options.Every = 5,
    gamma: Annotated[float, typer.Option(callback=options.number(0, 1), help="HyperDistill's decay.")] = 0.9,
    seed: options.Seed = 0,
    out: options.Out = Path("results/diagnose-sinusoid"),
) -> None:
    """ANIL on sinusoids, against exact RMD.

    Cosine to exact RMD along the inner run, and HyperDistill's calibration: figures 3 and 4 of the
    HyperDistill paper.
    """
    config = sinusoid.SinusoidConfig(meta_iterations=meta_iterations)
    with _guarded("nothing was kept. To start again"):
        _make(out)
        stages = diagnose_sinusoid.run(config, out, problems=problems, every=every, gamma=gamma, seed=seed)
    _diagnosed(stages, f"Sinusoid, T = {config.horizon}", problems, out)


def _diagnosed(stages: Sequence[diagnose.Stage], what: str, problems: int, out: Path) -> None:
    """The table, and what was written."""
    show(diagnose.table(stages, f"{what}: median over {problems} meta-batches, against exact RMD"))
    _echo_written([out / "figure3.png", out / "figure4.png", out / "diagnosis.json"])


# -- verify --------------------------------------------------------------------------------------
@app.command("verify")
def verify(
    name: Annotated[str | None, typer.Argument(help="An estimator, e.g. DrMAD; default: all of them.")] = None,
) -> None:
    """Hold every estimator to its own formula, and to the exact hypergradient where theory makes it exact."""
    try:
        passed = command.run(name)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="NAME") from error
    raise typer.Exit(0 if passed else 1)


def main() -> None:
    """Entry point."""
    app()
