"""Learning how far images are turned: EvoGrad's experiment with rotated digits.

The classifier is trained on upright digits and tested on turned ones. λ is one angle by which the
training images are turned; it moves at every step by the loss of turned validation images. The
angle that was never told should be found, and with it the accuracy.

Bohdal et al. 2021, `arXiv 2106.10575 <https://arxiv.org/abs/2106.10575>`__, section 5.1.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from metaopt.estimators import EvoGrad, OneStep
from metaopt.experiments.experiment import Experiment, Method, Run, SettingError
from metaopt.experiments.image_data import Source, read, split_images
from metaopt.experiments.pictures import draw_curves
from metaopt.experiments.schedules import Data, Part
from metaopt.experiments.statistics import summarise
from metaopt.experiments.supervised import Supervised
from metaopt.inner import inner_step
from metaopt.models import Rotation
from metaopt.models.rotation import rotate
from metaopt.optim import Adam
from metaopt.tree import Tree

METHODS = (
    Method("baseline", "baseline, no rotation", paper="81.79"),
    Method("one-step", "1-step", OneStep()),
    Method("evograd", "EvoGrad, K = 2", EvoGrad(around="after", unit_rate=True), paper="98.11"),
    Method("told", "angle given", settings={"told": True}),
)
"""EvoGrad as published for this experiment: its σ and τ, and weights perturbed after the step."""


@dataclass(frozen=True)
class RotationConfig:
    """Settings, the same for every method.

    Attributes:
        source: where the digits come from.
        degrees: angle of the validation and test images, anticlockwise.
        train: upright training images.
        validation: turned images of the outer loss.
        test: turned test images.
        epochs: times through the training images.
        batch: images of an inner and of an outer batch.
        lr: learning rate of the inner Adam.
        outer_lr: learning rate of the angle's Adam, in radians.
        told: whether the right angle is given at the start.
    """

    source: Source = Source("mnist")
    degrees: float = 30.0
    train: int = 3_000
    validation: int = 1_000
    test: int = 1_000
    epochs: int = 20
    batch: int = 100
    lr: float = 1e-3
    outer_lr: float = 1e-2
    told: bool = False

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which all training images are seen once."""
        return max(1, self.train // self.batch)

    @property
    def options(self) -> str:
        """The options common to all methods, in words."""
        return (
            f"{self.train} + {self.validation} + {self.test} images of {self.source.name}, LeNet, Adam {self.lr:g}, "
            f"batches of {self.batch}, "
            f"{self.epochs} epochs; one angle from 0 by Adam {self.outer_lr:g} at every step, no clipping; accuracy "
            "after the last step"
        )


@dataclass(frozen=True, kw_only=True)
class RotationRun(Run):
    """One run of one method; ``seconds`` include the evaluations.

    Attributes:
        accuracy: on the turned test images after the last step, in per cent; NaN if the run broke
            off.
        angle: after the last step, in degrees.
        curve: accuracy after every epoch.
        angles: angle after every epoch.
    """

    accuracy: float
    angle: float
    curve: list[float]
    angles: list[float]


def lenet(channels: int, size: int, classes: int) -> nn.Sequential:
    """LeNet: conv 5×5 of 6 and 16 channels, each with ReLU and pooling; layers of 120, 84 and ``classes``.

    Raises:
        ValueError: if the images are too small.

    >>> sum(p.numel() for p in lenet(1, 28, 10).parameters())
    44426
    """
    if size < 16:
        raise ValueError(f"LeNet needs images of 16×16 or more, got {size}×{size}")
    left = ((size - 4) // 2 - 4) // 2
    convolutions = (
        nn.Conv2d(channels, 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
    )
    return nn.Sequential(
        *convolutions, nn.Linear(16 * left**2, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, classes)
    )


_COUNTS = ("--train", "--validation", "--test")


def prepare(method: Method, config: RotationConfig, seed: int) -> tuple[Rotation, Data, Tree, Tree]:
    """The model, images in [0, 1], the initial weights, and λ.

    Deterministic in ``(config, seed)``, the same for every method but for ``told``.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if one is damaged, if there is no such source, or if there are too few images.
    """
    digits = read(config.source, per_class=0)
    counts = (config.train, config.validation, config.test)
    if sum(counts) > len(digits):
        raise SettingError(
            f"{' + '.join(map(str, counts))} images were asked for, but {config.source.name} has {len(digits)}",
            *_COUNTS,
        )
    parts = split_images(digits, [count / len(digits) for count in counts], seed)
    empty = [option for option, part in zip(_COUNTS, parts, strict=True) if len(part) == 0]
    if empty:
        raise SettingError("this takes a small share of every class, which comes to no image; ask for more", *empty)
    train, validation, test = (Part(_grey(part.images.float() / 255), part.labels) for part in parts)
    angle = torch.tensor(math.radians(config.degrees))
    data = Data(train, *[Part(rotate(part.x, angle), part.y) for part in (validation, test)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = lenet(data.train.x.shape[1], data.train.x.shape[-1], len(digits.names))
    model = Rotation.of(net, cross_entropy, degrees=config.degrees if method.configured(config).told else 0.0)
    return model, data, *model.init()


def run(method: Method, config: RotationConfig, seed: int) -> RotationRun:
    """Train once; deterministic in ``(method, config, seed)``."""
    model, data, w, lam = prepare(method, config, seed)
    training = Supervised(
        step=inner_step(model.inner_loss, Adam(lr=config.lr)),
        outer_loss=model.outer_loss,
        train=data.train,
        validation=data.validation,
        batch=config.batch,
        steps=config.epochs * config.steps_per_epoch,
        optimizer=functools.partial(torch.optim.Adam, lr=config.outer_lr),
        seed=seed,
    )
    started = time.perf_counter()
    failure = ""
    curve: list[float] = []
    angles: list[float] = []
    try:
        for t, w_t, lam_t in training.run(w, lam, method.estimator):
            if t % config.steps_per_epoch == 0:
                curve.append(100.0 * float(model.accuracy(w_t, lam_t, data.test)))
                angles.append(math.degrees(float(lam_t["angle"])))
    except FloatingPointError as error:
        failure = str(error)
    return RotationRun(
        method=method.key,
        seed=seed,
        seconds=time.perf_counter() - started,
        failure=failure,
        accuracy=math.nan if failure else curve[-1],
        angle=math.nan if failure else angles[-1],
        curve=curve,
        angles=angles,
    )


def table(methods: Sequence[Method], runs: Sequence[RotationRun], config: RotationConfig) -> Table:
    """One row per method: accuracy and angle over seeds, and on MNIST the paper's accuracy."""
    published = config.source.name == "mnist"
    title = f"{config.source.name}, test images turned by {config.degrees:g}°"
    remark = "; paper: all of MNIST" if published else ""
    shown = Table(title=title, caption=f"mean ± 95 % CI over the seeds that did not fail{remark}")
    columns = ("method", "accuracy, %", "angle, degrees", "failed", "s / run")
    for column in (*columns, "paper") if published else columns:
        shown.add_column(column, justify="left" if column == "method" else "right")
    for method in methods:
        mine = [run for run in runs if run.method == method.key]
        accuracy = summarise([run.accuracy for run in mine])
        angle = summarise([run.angle for run in mine])
        angle_shown = f"{angle.mean:.2f}" if method.estimator is None else angle.interval()
        seconds = f"{summarise([run.seconds for run in mine]).median:.1f}"
        shown.add_row(
            method.title,
            accuracy.interval(),
            angle_shown,
            f"{accuracy.failed}/{len(mine)}",
            seconds,
            *([method.published("rotation")] if published else []),
        )
    return shown


def draw(methods: Sequence[Method], runs: Sequence[RotationRun], config: RotationConfig, out: Path) -> list[Path]:
    """Accuracy and angle by epoch; returns the files."""
    paths = [out / "accuracy.png", out / "angle.png"]
    for path, pick, title, ylabel in (
        (paths[0], "curve", "accuracy on turned test images", "accuracy, %"),
        (paths[1], "angles", f"the angle that is learned (right: {config.degrees:g}°)", "angle, degrees"),
    ):
        curves = {method.title: [getattr(run, pick) for run in runs if run.method == method.key] for method in methods}
        draw_curves(curves, path, title=title, ylabel=ylabel, xlabel="epochs", yscale="linear")
    return paths


EXPERIMENT = Experiment("rotation", METHODS, RotationRun, prepare, run, table, draw)


def _grey(images: Tensor) -> Tensor:
    """One channel instead of three alike: grey images that were read in colour."""
    alike = images.shape[1] == 3 and bool((images == images[:, :1]).all())
    return images[:, :1] if alike else images
