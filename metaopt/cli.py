"""The command line: ``metaopt compare EXPERIMENT``, ``metaopt diagnose EXPERIMENT`` and ``metaopt verify``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from metaopt import __version__
from metaopt.experiments import (
    compare,
    diagnose,
    diagnose_many_shot,
    diagnose_sinusoid,
    many_shot,
    many_shot_report,
    many_shot_settings,
    noisy_labels,
    noisy_labels_report,
    rotation,
    sinusoid,
)
from metaopt.experiments.image_data import Source
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


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"metaopt {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
) -> None:
    pass


Estimators = Annotated[str | None, typer.Option(help="Comma-separated keys; default: all.")]
Seeds = Annotated[int, typer.Option(min=1, help="Independent meta-training runs of every method.")]
Out = Annotated[Path, typer.Option(help="Folder for the picture and the JSON of every run.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes; default: one per core.")]


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
    methods, runs = _run_all(
        sinusoid.METHODS, _names(estimators), lambda _: None, sinusoid.run, config, seeds, out, workers
    )
    curves = {method.title: [run.curve for run in runs if run.method == method.key] for method in methods}
    own_options = [method.title for method in methods if method.overrides]
    compare.draw_curves(
        curves, out / "convergence.png", ylabel="outer loss after T = 30 inner steps", dashed=own_options
    )
    title = f"Sinusoid, meta-test error over {config.test_tasks} tasks, M = {meta_iterations}, {seeds} seeds"
    compare.show(compare.table(methods, runs, config.FAILED_AT, title))
    typer.echo(f"options: {config.options}")
    for method in methods:
        if method.overrides:
            typer.echo(f"  except {method.title}: {replace(config, **method.overrides).options}")
    for run in runs:
        if run.failure:
            typer.echo(f"failed: {run.method}, seed {run.seed}: {run.failure}")
    typer.echo(f"wrote {out / 'convergence.png'} and {out / 'runs.json'}")


Data = Annotated[str, typer.Option(help="glyphs, cifar10, cifar100, tinyimagenet, fashion-mnist or folder.")]
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


@compare_app.command("anil")
def compare_anil(
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
    out: Out = Path("results/anil"),
    workers: Workers = None,
) -> None:
    """ANIL on many-shot image tasks: table 2 of the HyperDistill paper."""
    source = Source(data, root, size, download)
    _many_shot("anil", source, small, estimators, seeds, meta_iterations, fomaml, stable, out, workers)


@compare_app.command("warpgrad")
def compare_warpgrad(
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
    out: Out = Path("results/warpgrad"),
    workers: Workers = None,
) -> None:
    """WarpGrad on many-shot image tasks: tables 2 and 6, figures 2, 4-6 and 11-13 of the HyperDistill paper."""
    source = Source(data, root, size, download)
    _many_shot("warpgrad", source, small, estimators, seeds, meta_iterations, fomaml, stable, out, workers)


@compare_app.command("meta-weight-net")
def compare_meta_weight_net(
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
    out: Out = Path("results/meta-weight-net"),
    workers: Workers = None,
) -> None:
    """MetaWeightNet on many-shot image tasks with 40 % random labels.

    Table 2 and figure 7 of the HyperDistill paper.
    """
    source = Source(data, root, size, download)
    _many_shot("meta-weight-net", source, small, estimators, seeds, meta_iterations, fomaml, stable, out, workers)


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
    """MetaWeightNet against wrong labels on Fashion-MNIST.

    EvoGrad's experiment, figure 7 and two-stage training as in HyperDistill's.
    """
    config = noisy_labels.NoisyLabelsConfig(
        root, download, examples, clean, rate, steps=steps, evaluate_every=max(1, steps // 20)
    )
    once = functools.partial(compare.once, noisy_labels.run, noisy_labels.NoisyLabelsRun, out / "runs")
    prepare = functools.partial(noisy_labels.prepare, config=config, seed=0)
    methods, runs = _run_all(noisy_labels.METHODS, _names(estimators), prepare, once, config, seeds, out, workers)
    pictures = noisy_labels_report.draw(methods, runs, config, out)
    compare.show(noisy_labels_report.table(methods, runs, f"Fashion-MNIST, {rate:.0%} wrong labels, {seeds} seeds"))
    _close(config.options, runs, [*pictures, out / "runs.json"])


@compare_app.command("rotation")
def compare_rotation(
    data: Annotated[
        str, typer.Option(help="mnist, fashion-mnist, cifar10, … or folder (one sub-folder of images per class).")
    ] = "mnist",
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
    once = functools.partial(compare.once, rotation.run, rotation.RotationRun, out / "runs")
    prepare = functools.partial(rotation.prepare, config=config, seed=0)
    methods, runs = _run_all(rotation.METHODS, _names(estimators), prepare, once, config, seeds, out, workers)
    pictures = rotation.draw(methods, runs, config, out)
    compare.show(rotation.table(methods, runs, f"{data}, test images turned by {degrees:g}°, {seeds} seeds"))
    _close(config.options, runs, [*pictures, out / "runs.json"])


def _run_all(
    known: Sequence[Any],
    chosen: Sequence[str] | None,
    prepare: Callable[[Any], object],
    once: Callable[..., Any],
    config: Any,
    seeds: int,
    out: Path,
    workers: int | None,
    saved: Callable[[Any], Any] = lambda run: run,
) -> tuple[list[Any], list[Any]]:
    """The chosen methods and their runs, of which ``saved`` is written.

    ``prepare`` fails for missing files before any process starts.
    """
    try:
        methods = compare.select(known, chosen)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--estimators") from error
    out.mkdir(parents=True, exist_ok=True)
    try:
        prepare(methods[0])
        runs = compare.run_all(once, methods, config, seeds, workers=workers)
    except (ValueError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error)) from error
    compare.save([saved(run) for run in runs], config, out / "runs.json")
    return methods, runs


def _names(estimators: str | None) -> list[str] | None:
    return estimators.split(",") if estimators else None


def _close(options: str, runs: list[Any], written: list[Path]) -> None:
    typer.echo(f"options: {options}")
    for run in runs:
        if run.failure:
            typer.echo(f"failed: {run.method}, seed {run.seed}: {run.failure}")
    typer.echo("wrote " + ", ".join(str(path) for path in written))


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
    problems: Annotated[int, typer.Option(min=1, help="Meta-batches of new tasks at each stage.")] = 2,
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
    except (ValueError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error)) from error
    compare.show(
        diagnose.table(
            stages, f"WarpGrad on {data}, T = {config.horizon}: median over {problems} meta-batches, against exact RMD"
        )
    )
    typer.echo(f"wrote {out / 'figure3.png'}, {out / 'figure4.png'} and {out / 'diagnosis.json'}")


def _many_shot(
    model: str,
    source: Source,
    small: bool,
    estimators: str | None,
    seeds: int,
    meta_iterations: int | None,
    fomaml: bool,
    stable: bool,
    out: Path,
    workers: int | None,
) -> None:
    config = many_shot_settings.configure(
        model, source, small=small, stable=stable, fomaml=fomaml, meta_iterations=meta_iterations
    )
    default = many_shot_settings.TABLE_2_WEIGHTS if model == "meta-weight-net" else many_shot_settings.TABLE_2
    chosen, once = _names(estimators) or default, functools.partial(many_shot.run, folder=out / "runs")
    methods, runs = _run_all(
        many_shot_settings.METHODS,
        chosen,
        lambda _: many_shot.prepare(config, seed=0),
        once,
        config,
        seeds,
        out,
        workers,
        saved=lambda run: run._replace(lam=None),
    )
    pictures = many_shot_report.draw(methods, runs, config, out)
    title = f"{model} on {source.name}, {config.test_tasks} test tasks, M = {config.meta_iterations}, T = {config.horizon}, {seeds} seeds"
    compare.show(many_shot_report.table(methods, runs, config, title))
    _close(config.options, runs, [*pictures, out / "runs.json"])


@diagnose_app.command("sinusoid")
def diagnose_on_sinusoid(
    meta_iterations: Annotated[
        int, typer.Option(min=1, help="Inner runs of meta-training before the second look.")
    ] = 30,
    problems: Annotated[int, typer.Option(min=1, help="Meta-batches of new tasks at each stage.")] = 4,
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
    compare.show(
        diagnose.table(
            stages, f"Sinusoid, T = {config.horizon}: median over {problems} meta-batches, against exact RMD"
        )
    )
    typer.echo(f"wrote {out / 'figure3.png'}, {out / 'figure4.png'} and {out / 'diagnosis.json'}")


@app.command("verify")
def verify(
    name: Annotated[
        str | None, typer.Argument(help="An estimator, trajectory, optimiser or solver, e.g. DrMAD; default: all.")
    ] = None,
    first: Annotated[bool, typer.Option("--first", help="Stop at the first failure.")] = False,
) -> None:
    """Hold every part to a reference: estimators to their formulas and to closed forms, trajectories and steps to plain torch."""
    try:
        passed = command.run(name, first=first)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="NAME") from error
    raise typer.Exit(0 if passed else 1)


def main() -> None:
    """Entry point."""
    app()
