"""Figures 3 and 4 of the HyperDistill paper on the image experiments.

Before meta-training, and at a finished run's end.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metaopt.estimators import IFT, DrMAD, Estimator, FirstOrder, HyperDistill, OneStep
from metaopt.experiments.diagnose import Stage, diagnose
from metaopt.experiments.experiment import SettingError, check_settings, settings_of
from metaopt.experiments.many_shot import Setting, prepare
from metaopt.experiments.many_shot_settings import RATE, ManyShotConfig, hyperdistill
from metaopt.linsolve import Neumann
from metaopt.meta import Checkpoint, replicated
from metaopt.problem import Problem
from metaopt.tree import Tree

METHODS: Mapping[str, Estimator] = {
    "FO": FirstOrder(),
    "1-step": OneStep(),
    "N.IFT(10, 1)": IFT(Neumann(10, rate=RATE), converged=None, solved=None),
    "DrMAD": DrMAD(),
}
"""The methods of figure 3, besides HyperDistill."""

_NEW_TASKS = 1_000_000
"""Numbers of the runs whose tasks are diagnosed; meta-training draws others."""


def run(
    config: ManyShotConfig,
    out: Path,
    *,
    finished: Path | None = None,
    problems: int = 2,
    every: int = 25,
    gamma: float = 0.99,
    seed: int = 0,
) -> list[Stage]:
    """Diagnose, and write the figures; deterministic in its arguments.

    Args:
        config: of the experiment.
        out: folder.
        finished: the state file of a finished run, e.g.
            ``results/warpgrad/runs/hyperdistill-0.99-0.pt``, for a second stage at its end.
        problems: meta-batches of new tasks at each stage, besides the one that θ is fitted to.
        every: inner steps between two looks; the first step and the last are always looked at.
        gamma: of HyperDistill.
        seed: of the network and of the tasks.

    Raises:
        SettingError: if ``finished`` is a run of another configuration, or not finished.
    """
    method = hyperdistill(gamma)
    found = None if finished is None else _finished(finished, settings_of(method, config, seed), config.meta_iterations)
    setting, phi, lam = prepare(method, config, seed)
    stages = {"before meta-training": _problems(setting, phi, lam, problems)}
    thetas: list[float] = []
    if found is not None:
        stages[f"after {found.run} runs"] = _problems(setting, found.phi, found.notes["lam"], problems)
        thetas = list(found.notes["course"].theta)
    at = sorted({1, config.horizon, *range(every, config.horizon + 1, every)})
    return diagnose(
        stages,
        METHODS,
        HyperDistill(gamma=gamma),
        out,
        at=at,
        thetas=thetas,
        gammas=(0.0, 0.9, 0.99, 0.999),
    )


def _finished(path: Path, settings: Mapping[str, Any], runs: int) -> Checkpoint:
    """The state at the end of a run with these settings."""
    try:
        found = Checkpoint.load(path)
        check_settings(path, found.notes["settings"], settings)
    except (ValueError, KeyError, OSError) as error:
        raise SettingError(str(error), "--finished") from error
    if found.run < runs:
        raise SettingError(f"{path} has done {found.run} of {runs} runs; finish it first", "--finished")
    return found


def _problems(setting: Setting, phi: Tree, lam: Tree, count: int) -> list[Problem]:
    """Meta-batches of new tasks, started from φ."""
    found = []
    for number in range(count + 1):
        task = setting.task(_NEW_TASKS + number)
        assert callable(task.batches) and callable(task.outer_batches)
        horizon = setting.config.horizon
        batches = [task.batches(t) for t in range(1, horizon + 1)]
        found.append(
            Problem(
                setting.step,
                setting.outer_loss,
                replicated(phi, task.tasks),
                lam,
                batches,
                task.outer_batches(horizon),
                name=setting.config.model,
            )
        )
    return found
