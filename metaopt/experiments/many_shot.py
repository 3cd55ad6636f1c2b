"""Many-shot image classification: section 5 of the HyperDistill paper (tables 2, 3, 6; figures 2, 5, 6, 11-13).

Tasks are 10-way episodes over classes that training never saw. Three meta-models: ANIL, WarpGrad,
MetaWeightNet. The weights adapt for T = 100 steps of momentum SGD with cropping and flipping, λ
moves online by SGD, the initial weights by Reptile.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy

from metaopt.estimators import HyperDistill
from metaopt.experiments.image_data import Splits, load
from metaopt.experiments.many_shot_settings import PAPER_COLUMNS, ManyShotConfig, Method
from metaopt.inner import ConstantSlots, Step, inner_step
from metaopt.meta import FOMAML, Checkpoint, HyperSteps, MetaTask, MetaTraining, Outer, Reptile, looped, replicated
from metaopt.models import ANIL, MetaModel, MetaWeightNet, SigmoidAbove, WarpGrad, conv_net
from metaopt.optim import SGD
from metaopt.tasks import Episodes, label_noise
from metaopt.tree import Tree


class ManyShotRun(NamedTuple):
    """One meta-training run of one method, and its meta-test.

    Attributes:
        method: key of the method.
        seed: of the initial weights and of all tasks.
        accuracy: on test images of unseen classes, mean over the meta-test's tasks; NaN if the run
            broke off.
        curve: outer loss per task at the end of each inner run (figure 2).
        validation: (runs done, accuracy on the validation classes) (figure 5).
        theta: HyperDistill's θ at each run, else empty.
        products: αA and αB products per inner run, calibration spread over the runs.
        seconds: per inner run, mean over this process' runs.
        failure: what went wrong, or "".
        lam: the hyperparameters learned.
    """

    method: str
    seed: int
    accuracy: float
    curve: list[float]
    validation: list[tuple[int, float]]
    theta: list[float]
    products: float
    seconds: float
    failure: str
    lam: Tree


@dataclass(frozen=True)
class Setting:
    """A configuration made ready: model, stacked step and losses, tasks."""

    config: ManyShotConfig
    model: MetaModel
    splits: Splits
    seed: int

    @property
    def step(self) -> Step:
        """Φ of the meta-batch."""
        step = inner_step(looped(self.model.inner_loss), SGD(lr=self.config.inner_lr, momentum=0.9))
        return ConstantSlots(step) if self.config.constant_momentum else step

    def outer_loss(self, w: Tree, lam: Tree, batch: Any) -> torch.Tensor:
        """Mean over the tasks."""
        return looped(self.model.outer_loss, reduction="mean")(w, lam, batch)

    def task(self, run: int) -> MetaTask:
        """The tasks of an inner run; the calibrations' runs (≤ 0) have seeds of their own."""
        c = self.config
        number = run if run > 0 else _APART - run
        episode = self._episodes(self.splits.train).sample(c.meta_batch, seed=_seed(self.seed, _TRAIN, number))
        return MetaTask(episode.batches, episode.outer_batches, c.meta_batch)

    def accuracies(self, phi: Tree, lam: Tree, data: Any, tasks: int, kind: int) -> Iterator[float]:
        """Test accuracy after an inner run from ``phi``, task by task, a meta-batch at a time."""
        c, step = self.config, self.step
        episodes = self._episodes(data)
        for start in range(0, tasks, c.meta_batch):
            count = min(c.meta_batch, tasks - start)
            episode = episodes.sample(count, seed=_seed(self.seed, kind, start))
            state = step.init(replicated(phi, count), lam)
            for t in range(1, c.horizon + 1):
                state = step(state, lam, episode.batches(t))
            x, y = episode.test
            for i in range(count):
                w = {name: leaf[i] for name, leaf in state.w.items()}
                yield float(self.model.accuracy(w, lam, (x[i], y[i])))

    def _episodes(self, data: Any) -> Episodes:
        c = self.config
        corruption = label_noise.uniform if c.corruption else None
        crop, flip = max(1, data.images.shape[-1] // 8), self.splits.flip
        return Episodes(
            data, c.ways, c.shots, c.shots, c.batch_size, crop=crop, flip=flip, corruption=corruption, rate=c.corruption
        )


def prepare(config: ManyShotConfig, seed: int) -> tuple[Setting, Tree, Tree]:
    """The setting, the initial weights of one task, and λ. Deterministic in ``(config, seed)``."""
    splits = load(config.source, ways=config.ways, per_class=2 * config.shots)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(config, splits.train.images.shape[1:])
    phi, lam = model.init()
    return Setting(config, model, splits, seed), phi, lam


def build(config: ManyShotConfig, shape: torch.Size) -> MetaModel:
    """The meta-model on its network.

    Raises:
        ValueError: if there is no such model.
    """
    net = functools.partial(
        conv_net, channels=config.channels, classes=config.ways, in_channels=shape[0], image_size=shape[-1]
    )
    if config.model == "anil":
        return ANIL.of(net(blocks=4), weights=["block4.*", "head.*"], loss=cross_entropy)
    if config.model == "warpgrad":
        return WarpGrad.of(net(blocks=3), loss=cross_entropy)
    if config.model == "meta-weight-net":
        return MetaWeightNet.of(
            net(blocks=3), functools.partial(cross_entropy, reduction="none"), hidden=200, squash=SigmoidAbove(0.1)
        )
    raise ValueError(f"no meta-model is called {config.model!r}; there are {', '.join(PAPER_COLUMNS)}")


def run(method: Method, config: ManyShotConfig, seed: int, folder: Path | None = None) -> ManyShotRun:
    """Meta-train and meta-test once; deterministic in ``(method, config, seed)``.

    Args:
        method: the row.
        config: the settings.
        seed: of everything.
        folder: where the run's state is kept after each inner run; a run that was broken off goes
            on from there, a finished one is read.

    Raises:
        ValueError: if the folder holds a run with other settings.
    """
    path = folder / f"{method.key}-{seed}.pt" if folder else None
    resume, notes = _earlier(path, config)
    if isinstance(notes.get("result"), ManyShotRun):
        return notes["result"]
    setting, phi, lam = prepare(config, seed)
    outer = Outer(
        lam,
        functools.partial(torch.optim.SGD, lr=config.outer_lr, momentum=0.9),
        scheduler=functools.partial(
            torch.optim.lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.0, total_iters=config.meta_iterations
        ),
        clip_norm=config.clip_norm,
    )
    failure, report = "", None
    notes["clock"] = time.perf_counter()
    try:
        for report in _training(setting, method).runs(phi, outer, setting.task, config.meta_iterations, resume=resume):
            notes = _noted(notes, setting, report)
            if path:
                report.checkpoint(outer, notes).save(path)
    except FloatingPointError as error:
        failure = str(error)
    phi = report.phi if report else (resume.phi if resume else phi)
    accuracies = (
        [] if failure else list(setting.accuracies(phi, outer.lam, setting.splits.test, config.test_tasks, _TEST))
    )
    done = max(1, len(notes["curve"]))
    result = ManyShotRun(
        method.key,
        seed,
        sum(accuracies) / len(accuracies) if accuracies else math.nan,
        notes["curve"],
        notes["validation"],
        notes["theta"],
        notes["products"] / done,
        notes["seconds"] / done,
        failure,
        outer.lam,
    )
    if path:
        Checkpoint(done, phi, outer.state_dict(), method.estimator, {**notes, "result": result}).save(path)
    return result


def _training(setting: Setting, method: Method) -> MetaTraining:
    c = setting.config
    hyper_steps = HyperSteps(every=c.hyper_interval) if method.last is None else HyperSteps(last=method.last)
    if c.initialisation not in ("reptile", "fomaml"):
        raise ValueError(f"initialisation is 'reptile' or 'fomaml', got {c.initialisation!r}")
    initialisation = Reptile(rate=1.0) if c.initialisation == "reptile" else FOMAML(rate=c.inner_lr)
    return MetaTraining(
        setting.step,
        setting.outer_loss,
        method.estimator,
        c.horizon,
        hyper_steps,
        initialisation,
        calibration_period=c.calibration_period,
    )


def _earlier(path: Path | None, config: ManyShotConfig) -> tuple[Checkpoint | None, dict[str, Any]]:
    """Where an earlier call had got to, and its notes; fresh notes otherwise."""
    fresh = {
        "config": asdict(config),
        "curve": [],
        "validation": [],
        "theta": [],
        "products": 0,
        "seconds": 0.0,
        "clock": 0.0,
    }
    if path is None or not path.exists():
        return None, fresh
    found = Checkpoint.load(path)
    if found.notes["config"] != fresh["config"]:
        different = [key for key, value in fresh["config"].items() if found.notes["config"].get(key) != value]
        raise ValueError(
            f"{path} holds a run with other settings ({', '.join(different)}); choose another --out, or remove it"
        )
    return found, found.notes


def _noted(notes: dict[str, Any], setting: Setting, report: Any) -> dict[str, Any]:
    """The notes after one more inner run. A meta-validation is not counted as time."""
    seconds = notes["seconds"] + time.perf_counter() - notes["clock"]
    c, validation = setting.config, notes["validation"]
    if c.validate_every and report.run % c.validate_every == 0:
        found = list(
            setting.accuracies(report.phi, report.lam, setting.splits.validation, c.validation_tasks, _VALIDATION)
        )
        validation = [*validation, (report.run, sum(found) / len(found))]
    theta = [report.estimator.theta] if isinstance(report.estimator, HyperDistill) else []
    return {
        **notes,
        "curve": [*notes["curve"], report.outer_losses[-1]],
        "validation": validation,
        "theta": notes["theta"] + theta,
        "products": notes["products"] + report.cost.products,
        "seconds": seconds,
        "clock": time.perf_counter(),
    }


_TRAIN, _VALIDATION, _TEST = 0, 1, 2
_APART = 5_000_000


def _seed(seed: int, kind: int, number: int) -> int:
    """Seeds that never meet: of ten million numbers a kind, three kinds a seed."""
    return (3 * seed + kind) * 10_000_000 + number
