"""The command line: ``metaopt compare EXPERIMENT``, ``metaopt diagnose EXPERIMENT`` and ``metaopt verify``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

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
    rotation,
    sinusoid,
)
from metaopt.experiments.experiment import Experiment
from metaopt.experiments.image_data import Source
from metaopt.experiments.pictures import show
from metaopt.verify import command

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Differentiate through training: compare estimators, verify them."
)
compare_app = typer.Typer(no_args_is_help=True, help="Run an experiment with several estimators side by side.")
app.add_typer(compare_app, name="compare")
diagnose_app = typer.Typer(
    no_args_is_help=True, help="How close each estimator's hypergradients are to the exact ones."
)
app.add_typer(diagnose_app, name="diagnose")

Estimators = Annotated[str | None, typer.Option(help="Comma-separated keys; default: all of them, or the paper's.")]
Seeds = Annotated[int, typer.Option(min=1, help="Independent runs of every method.")]
Out = Annotated[
    Path, typer.Option(help="Folder for the pictures and the JSON of every run; the same folder again goes on there.")
]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes; default: one per core.")]
Data = Annotated[str, typer.Option(help="glyphs, mnist, fashion-mnist, cifar10, cifar100, tinyimagenet or folder.")]
Root = Annotated[Path, typer.Option(help="Where the data set's files are (or, for folder, the folder).")]
Size = Annotated[int | None, typer.Option(min=8, help="Height and width to work at; default: the profile's.")]
Small = Annotated[
    bool, typer.Option("--small", help="The profile for two cores: 14×14 pixels, 16 channels, 50 shots, 10 inner runs.")
]
Download = Annotated[bool, typer.Option("--download", help="Fetch the data set's files where they are missing.")]
Iterations = Annotated[int | None, typer.Option(min=1, help="Inner runs of meta-training (M); default: the profile's.")]
Fomaml = Annotated[bool, typer.Option("--fomaml", help="FOMAML instead of Reptile for the initial weights (table 6).")]
Stable = Annotated[
    bool,
    typer.Option(
        "--stable/--printed", help="Bound the hypergradient's norm by 1 and hold the momentum constant in A, for all."
    ),
]
Problems = Annotated[int, typer.Option(min=1, help="Meta-batches of new tasks at each stage.")]


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


# -- compare -------------------------------------------------------------------------------------
@compare_app.command("sinusoid")
def compare_sinusoid(
    estimators: Estimators = None,
    meta_iterations: Annotated[int, typer.Option(min=1, help="Inner runs of meta-training (M).")] = 30,
    seeds: Seeds = 5,
    out: Out = Path("results/sinusoid"),
    clip_norm: Annotated[float, typer.Option(min=0, help="Bound on each hypergradient's norm; 0 for none.")] = 1.0,
    exact_momentum: Annotated[
        bool, typer.Option("--exact-momentum", help="Differentiate through the momentum buffer, for every method.")
    ] = False,
    workers: Workers = None,
) -> None:
    """Sinusoid regression with ANIL: table 4 and figure 8 of the HyperDistill paper."""
    config = sinusoid.SinusoidConfig(
        meta_iterations=meta_iterations, clip_norm=clip_norm or None, constant_momentum=not exact_momentum
    )
    _compare(sinusoid.EXPERIMENT, config, _keys(estimators), seeds, out, workers)


def _many_shot_command(model: str, default: Sequence[str], summary: str) -> None:
    """Add ``metaopt compare MODEL``; the models share their options."""

    @compare_app.command(model, help=summary)
    def compare_many_shot(
        data: Data = "glyphs",
        root: Root = Path("data"),
        small: Small = False,
        estimators: Estimators = None,
        seeds: Seeds = 5,
        meta_iterations: Iterations = None,
        size: Size = None,
        fomaml: Fomaml = False,
        stable: Stable = True,
        download: Download = False,
        out: Out = Path("results") / model,
        workers: Workers = None,
    ) -> None:
        source = Source(data, root, size, download)
        config = many_shot_settings.configure(
            model, source, small=small, stable=stable, fomaml=fomaml, meta_iterations=meta_iterations
        )
        _compare(many_shot_report.EXPERIMENT, config, _keys(estimators) or default, seeds, out, workers)


_many_shot_command(
    "anil", many_shot_settings.TABLE_2, "ANIL on many-shot image tasks: table 2 of the HyperDistill paper."
)
_many_shot_command(
    "warpgrad",
    many_shot_settings.TABLE_2,
    "WarpGrad on many-shot image tasks: tables 2 and 6, figures 2, 4-6 and 11-13 of the HyperDistill paper.",
)
_many_shot_command(
    "meta-weight-net",
    many_shot_settings.TABLE_2_WEIGHTS,
    "MetaWeightNet on many-shot image tasks with 40 % random labels: table 2 and figure 7 of the HyperDistill paper.",
)


@compare_app.command("noisy-labels")
def compare_noisy_labels(
    root: Annotated[
        Path, typer.Option(help="Folder that holds FashionMNIST/raw/ with the four unpacked files.")
    ] = Path("data"),
    estimators: Estimators = None,
    seeds: Seeds = 3,
    steps: Annotated[int, typer.Option(min=1, help="Training steps (T).")] = 2_000,
    examples: Annotated[int, typer.Option(min=1, help="Training images.")] = 10_000,
    clean: Annotated[int, typer.Option(min=1, help="Clean images of the outer loss.")] = 1_000,
    rate: Annotated[float, typer.Option(min=0, max=1, help="Share of wrong labels.")] = 0.4,
    download: Download = False,
    out: Out = Path("results/noisy-labels"),
    workers: Workers = None,
) -> None:
    """MetaWeightNet against wrong labels: EvoGrad's experiment, HyperDistill's figure 7 and two-stage training."""
    config = noisy_labels.NoisyLabelsConfig(
        root, download, examples, clean, rate, steps=steps, evaluate_every=max(1, steps // 20)
    )
    _compare(noisy_labels_report.EXPERIMENT, config, _keys(estimators), seeds, out, workers)


@compare_app.command("rotation")
def compare_rotation(
    data: Data = "mnist",
    root: Root = Path("data"),
    size: Size = 28,
    estimators: Estimators = None,
    seeds: Seeds = 3,
    epochs: Annotated[int, typer.Option(min=1, help="Times through the training images.")] = 20,
    train: Annotated[int, typer.Option(min=1, help="Upright training images.")] = 3_000,
    validation: Annotated[int, typer.Option(min=1, help="Turned images of the outer loss.")] = 1_000,
    test: Annotated[int, typer.Option(min=1, help="Turned test images.")] = 1_000,
    degrees: Annotated[float, typer.Option(help="Angle of the validation and test images.")] = 30.0,
    download: Download = False,
    out: Out = Path("results/rotation"),
    workers: Workers = None,
) -> None:
    """Learning the angle by which test images are turned: EvoGrad's experiment."""
    config = rotation.RotationConfig(Source(data, root, size, download), degrees, train, validation, test, epochs)
    _compare(rotation.EXPERIMENT, config, _keys(estimators), seeds, out, workers)


def _compare(
    experiment: Experiment[Any], config: Any, keys: Sequence[str] | None, seeds: int, out: Path, workers: int | None
) -> None:
    """Run what has not been run yet, then print the table and say what was written."""
    try:
        methods = experiment.select(keys)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--estimators") from error
    try:
        runs = experiment.conduct(methods, config, seeds, out, workers=workers)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    except KeyboardInterrupt:
        again = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        typer.echo(f"\nstopped; what has finished is kept in {out}. To go on: {again}", err=True)
        raise typer.Exit(130) from None
    written = [*experiment.draw(methods, runs, config, out), out / "runs.json"]
    show(experiment.table(methods, runs, config))
    typer.echo(f"{seeds} seed{'s' if seeds > 1 else ''}; options: {config.options}")
    for method in methods:
        if method.configured(config).options != config.options:
            typer.echo(f"  except {method.title}: {method.configured(config).options}")
    for run in runs:
        if run.failure:
            typer.echo(f"failed: {run.method}, seed {run.seed}: {run.failure}")
    _echo_written(written)


def _keys(estimators: str | None) -> list[str] | None:
    return estimators.split(",") if estimators else None


def _echo_written(paths: Sequence[Path]) -> None:
    typer.echo("wrote " + ", ".join(str(path) for path in paths))


# -- diagnose ------------------------------------------------------------------------------------
@diagnose_app.command("warpgrad")
def diagnose_on_warpgrad(
    data: Data = "glyphs",
    root: Root = Path("data"),
    small: Small = False,
    meta_iterations: Iterations = None,
    size: Size = None,
    stable: Stable = True,
    finished: Annotated[
        Path | None, typer.Option(help="State file of a finished run, for a second look: results/warpgrad/runs/….pt.")
    ] = None,
    problems: Problems = 2,
    every: Annotated[int, typer.Option(min=1, help="Inner steps between two comparisons along a run.")] = 25,
    out: Out = Path("results/diagnose-warpgrad"),
) -> None:
    """Cosine to exact RMD along the inner run of WarpGrad, and HyperDistill's calibration.

    Figures 3 and 4 of the HyperDistill paper.
    """
    config = many_shot_settings.configure(
        "warpgrad", Source(data, root, size), small=small, stable=stable, meta_iterations=meta_iterations
    )
    try:
        stages = diagnose_many_shot.run(config, out, finished=finished, problems=problems, every=every)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    _diagnosed(stages, f"WarpGrad on {data}, T = {config.horizon}", problems, out)


@diagnose_app.command("sinusoid")
def diagnose_on_sinusoid(
    meta_iterations: Annotated[
        int, typer.Option(min=1, help="Inner runs of meta-training before the second look.")
    ] = 30,
    problems: Problems = 4,
    every: Annotated[int, typer.Option(min=1, help="Inner steps between two comparisons along a run.")] = 5,
    gamma: Annotated[float, typer.Option(min=0, max=1, help="HyperDistill's decay.")] = 0.9,
    seed: Annotated[int, typer.Option(help="Of the network and the tasks.")] = 0,
    out: Out = Path("results/diagnose-sinusoid"),
) -> None:
    """Cosine to exact RMD along the inner run, and HyperDistill's calibration.

    Figures 3 and 4 of the HyperDistill paper.
    """
    config = sinusoid.SinusoidConfig(meta_iterations=meta_iterations)
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
