"""Many-shot image classification: section 5 of the HyperDistill paper (tables 2, 3, 6; figures 2, 5, 6, 11-13).

Tasks are 10-way episodes over classes that training never saw. Three meta-models: ANIL, WarpGrad,
MetaWeightNet. The weights adapt for T = 100 steps of momentum SGD with cropping and flipping, λ
moves online by SGD, the initial weights by Reptile.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy

from metaopt.estimators import HyperDistill
from metaopt.experiments.experiment import Method, Run, check_settings, settings_of
from metaopt.experiments.image_data import Splits, load
from metaopt.experiments.many_shot_settings import MODELS, ManyShotConfig
from metaopt.inner import ConstantSlots, Step, inner_step
from metaopt.meta import (
    FOMAML,
    Checkpoint,
    Initialisation,
    MetaReport,
    MetaTask,
    MetaTraining,
    OuterOptimizer,
    Reptile,
    looped,
    replicated,
)
from metaopt.models import ANIL, MetaModel, MetaWeightNet, SigmoidAbove, WarpGrad, conv_net
from metaopt.models.meta_weight_net import batch_mean
from metaopt.optim import SGD
from metaopt.tasks import Episodes, label_noise
from metaopt.tree import Tree


@dataclass(frozen=True, kw_only=True)
class ManyShotRun(Run):
    """One meta-training run of one method, and its meta-test; ``seconds`` are per inner run.

    Attributes:
        accuracy: on test images of unseen classes, mean over the meta-test's tasks; NaN if the run
            broke off.
        curve: outer loss per task at the end of each inner run (figure 2).
        validation: (runs done, accuracy on the validation classes) (figure 5).
        theta: HyperDistill's θ at each run, else empty.
        products: αA and αB products per inner run, calibration spread over the runs.
        weights: what a MetaWeightNet gives examples whose losses are :data:`LOSSES` (figure 7),
            else empty.
    """

    accuracy: float
    curve: list[float]
    validation: list[tuple[int, float]]
    theta: list[float]
    products: float
    weights: list[float]


LOSSES = torch.linspace(0, 6, 200)
"""Losses for which the learned weights are drawn."""


class Course(NamedTuple):
    """What is noted along a run; see :class:`ManyShotRun`. ``products`` and ``seconds`` are of all inner runs."""

    curve: tuple[float, ...] = ()
    validation: tuple[tuple[int, float], ...] = ()
    theta: tuple[float, ...] = ()
    products: int = 0
    seconds: float = 0.0


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
        """The tasks of an inner run; the calibrations' runs (≤ 0) have their own seeds."""
        c = self.config
        number = run if run > 0 else _APART - run
        episode = self._episodes(self.splits.train).sample(c.meta_batch, seed=_seed(self.seed, _TRAIN, number))
        return MetaTask(episode.batches, episode.outer_batches, c.meta_batch)

    def accuracy(self, phi: Tree, lam: Tree, data: Any, tasks: int, kind: int) -> float:
        """Mean accuracy on test images after an inner run from ``phi``."""
        return statistics.fmean(self._accuracies(phi, lam, data, tasks, kind))

    def _accuracies(self, phi: Tree, lam: Tree, data: Any, tasks: int, kind: int) -> Iterator[float]:
        """Task by task, a meta-batch at a time."""
        c = self.config
        step = self.step
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
        crop = max(1, data.images.shape[-1] // 8)
        flip = self.splits.flip
        return Episodes(
            data, c.ways, c.shots, c.shots, c.batch_size, crop=crop, flip=flip, corruption=corruption, rate=c.corruption
        )


def prepare(_: Method, config: ManyShotConfig, seed: int) -> tuple[Setting, Tree, Tree]:
    """The setting, the initial weights of one task, and λ: the same for every method.

    Raises:
        FileNotFoundError: if a file of images is missing.
        ValueError: if one is damaged, if there are too few images, or no such model or initialisation.
    """
    splits = load(config.source, ways=config.ways, shots=config.shots)
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
        return ANIL.of(net(blocks=4), cross_entropy, weights=["block4.*", "head.*"])
    if config.model == "warpgrad":
        return WarpGrad.of(net(blocks=3), loss=cross_entropy)
    if config.model == "meta-weight-net":
        return MetaWeightNet.of(
            net(blocks=3),
            functools.partial(cross_entropy, reduction="none"),
            hidden=200,
            squash=SigmoidAbove(0.1),
            coefficients=batch_mean,
        )
    raise ValueError(f"no meta-model is called {config.model!r}; there are {', '.join(MODELS)}")


def run(method: Method, config: ManyShotConfig, seed: int, folder: Path | None = None) -> ManyShotRun:
    """Meta-train and meta-test once; deterministic in ``(method, config, seed)``.

    Args:
        method: the row.
        config: the settings.
        seed: of everything.
        folder: where the run's state is kept after each inner run; a run that was broken off goes
            on from there.

    Raises:
        ValueError: if the folder holds a run with other settings, or a damaged file.
    """
    setting, phi, lam = prepare(method, config, seed)
    settings = settings_of(method, config, seed)
    config = method.configured(config)
    path = folder / f"{method.key}-{seed}.pt" if folder else None
    resume = earlier(path, settings) if path and path.exists() else None
    course = resume.notes["course"] if resume else Course()
    outer = OuterOptimizer(
        lam,
        functools.partial(torch.optim.SGD, lr=config.outer_lr, momentum=0.9),
        scheduler=functools.partial(
            torch.optim.lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.0, total_iters=config.meta_iterations
        ),
        clip_norm=config.clip_norm,
    )
    if resume:
        phi = resume.phi
    training = training_of(method, config, setting)
    failure = ""
    clock = time.perf_counter()
    try:
        for report in training.runs(phi, outer, setting.task, config.meta_iterations, resume=resume):
            phi = report.phi
            course = noted(course, report, time.perf_counter() - clock)
            if config.validate_every and report.run % config.validate_every == 0:
                course = validated(course, setting, report)
            if path:
                report.checkpoint(outer, {"settings": settings, "course": course, "lam": report.lam}).save(path)
            clock = time.perf_counter()
    except FloatingPointError as error:
        failure = str(error)
    accuracy = math.nan
    if not failure:
        accuracy = setting.accuracy(phi, outer.lam, setting.splits.test, config.test_tasks, _TEST)
    runs = max(1, len(course.curve))
    return ManyShotRun(
        method=method.key,
        seed=seed,
        seconds=course.seconds / runs,
        failure=failure,
        accuracy=accuracy,
        curve=list(course.curve),
        validation=list(course.validation),
        theta=list(course.theta),
        products=course.products / runs,
        weights=weights_of(setting.model, outer.lam),
    )


def training_of(method: Method, config: ManyShotConfig, setting: Setting) -> MetaTraining:
    """Meta-training with this method."""
    if config.initialisation not in INITIALISATIONS:
        raise ValueError(f"initialisation is {' or '.join(INITIALISATIONS)}, got {config.initialisation!r}")
    return MetaTraining(
        setting.step,
        setting.outer_loss,
        method.moving,
        config.horizon,
        config.hyper_steps,
        INITIALISATIONS[config.initialisation](config.inner_lr),
        calibration_period=config.calibration_period,
    )


INITIALISATIONS: Mapping[str, Callable[[float], Initialisation]] = {
    "reptile": lambda _: Reptile(rate=1.0),
    "fomaml": lambda inner_lr: FOMAML(rate=inner_lr),
}
"""How the initial weights are learned, given the inner learning rate."""


def earlier(path: Path, settings: Mapping[str, Any]) -> Checkpoint:
    """Where an earlier call had got to.

    Raises:
        ValueError: if the file is damaged, or was made with other settings.
    """
    found = Checkpoint.load(path)
    check_settings(path, found.notes["settings"], settings)
    return found


def noted(course: Course, report: MetaReport, seconds: float) -> Course:
    """The course after one more inner run."""
    theta = course.theta
    if isinstance(report.estimator, HyperDistill):
        theta = (*theta, report.estimator.theta)
    return course._replace(
        curve=(*course.curve, report.outer_losses[-1]),
        theta=theta,
        products=course.products + report.cost.products,
        seconds=course.seconds + seconds,
    )


def validated(course: Course, setting: Setting, report: MetaReport) -> Course:
    """The course after a meta-validation, which is not counted as time."""
    accuracy = setting.accuracy(
        report.phi, report.lam, setting.splits.validation, setting.config.validation_tasks, _VALIDATION
    )
    return course._replace(validation=(*course.validation, (report.run, accuracy)))


def weights_of(model: MetaModel, lam: Tree) -> list[float]:
    """The weights that a MetaWeightNet gives to examples by their losses; empty for another model."""
    if not isinstance(model, MetaWeightNet):
        return []
    with torch.no_grad():
        return model.weights(lam, LOSSES).flatten().tolist()


_TRAIN = 0
_VALIDATION = 1
_TEST = 2
_APART = 5_000_000


def _seed(seed: int, kind: int, number: int) -> int:
    """Seeds that never meet: of ten million numbers a kind, three kinds a seed."""
    return (3 * seed + kind) * 10_000_000 + number
