"""The command line: ``metaopt compare EXPERIMENT`` and ``metaopt verify``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from metaopt.experiments import compare, sinusoid
from metaopt.verify import command

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Differentiate through training: compare estimators, verify them.")
compare_app = typer.Typer(no_args_is_help=True, help="Run an experiment with several estimators side by side.")
app.add_typer(compare_app, name="compare")

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
    exact_momentum: Annotated[bool, typer.Option("--exact-momentum", help="Differentiate through the momentum buffer, for every method.")] = False,
    workers: Workers = None,
) -> None:
    """Sinusoid regression with ANIL: table 4 and figure 8 of the HyperDistill paper."""
    config = sinusoid.SinusoidConfig(meta_iterations=meta_iterations, clip_norm=clip_norm or None, constant_momentum=not exact_momentum)
    try:
        methods = compare.select(sinusoid.METHODS, estimators.split(",") if estimators else None)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--estimators") from error
    out.mkdir(parents=True, exist_ok=True)
    runs = compare.run_all(sinusoid.run, methods, config, seeds, workers=workers)
    compare.save(runs, config, out / "runs.json")
    curves = {method.title: [run.curve for run in runs if run.method == method.key] for method in methods}
    own_options = [method.title for method in methods if method.overrides]
    compare.draw_curves(curves, out / "convergence.png", ylabel="outer loss after T = 30 inner steps", dashed=own_options)
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


@app.command("verify")
def verify(name: Annotated[str | None, typer.Argument(help="An estimator, e.g. DrMAD; default: all of them.")] = None) -> None:
    """Hold every estimator to its own formula, and to the exact hypergradient where theory makes it exact; fails if one is off."""
    try:
        passed = command.run(name)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="NAME") from error
    raise typer.Exit(0 if passed else 1)


def main() -> None:
    """Entry point."""
    app()
