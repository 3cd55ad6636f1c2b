"""Learning to weight examples with wrong labels: MetaWeightNet on Fashion-MNIST (section 5.3 of EvoGrad's paper).

A classifier is trained on 10,000 images of which 40 % have one of two wrong classes; λ, the weight
net, moves at every step by the loss of 1,000 clean images. Each method is held against the same
weight net at its random initial values ("frozen"), because a net that never learned weights
examples too. Then a second classifier is trained from scratch with the weight net as it was found,
which no longer moves (two stages: the "standard learning" of table 5 in the HyperDistill paper).

Shu et al. 2019, `arXiv 1902.07379 <https://arxiv.org/abs/1902.07379>`__; Bohdal et al. 2021, `arXiv
2106.10575 <https://arxiv.org/abs/2106.10575>`__; Lee et al. 2022, `arXiv 2110.02508
<https://arxiv.org/abs/2110.02508>`__.
"""

from __future__ import annotations

import functools
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from metaopt.estimators import EvoGrad, HyperDistill, OneStep
from metaopt.experiments.experiment import Method, Run, SettingError
from metaopt.experiments.image_data import fetched
from metaopt.experiments.schedules import Data, Part, of_images
from metaopt.experiments.supervised import Supervised
from metaopt.inner import inner_step
from metaopt.models import MetaWeightNet, SigmoidAbove
from metaopt.models.meta_weight_net import Squash, batch_normalised
from metaopt.optim import SGD
from metaopt.tasks import LabelledImages, fashion_mnist, label_noise
from metaopt.tree import Tree


@dataclass(frozen=True)
class AllAlike:
    """A squash that gives every example weight one."""

    def __call__(self, x: Tensor) -> Tensor:
        """The weights."""
        return torch.ones_like(x)


METHODS = (
    Method("uniform", "uniform weights", settings={"squash": AllAlike()}),
    Method("frozen", "frozen random net"),
    Method("one-step", "1-step", OneStep()),
    Method("hyperdistill", "HyperDistill, π = 1, γ = .99", HyperDistill(gamma=0.99, pi="plain")),
    Method("evograd", "EvoGrad, K = 2", EvoGrad(unit_rate=True)),
)
"""EvoGrad at its published σ and τ; ``unit_rate`` gives it 1-step's size, so that Adam's ε does not count."""

HIGHEST_LOSS = 10.0
BINS = 100
"""The weighting curve is drawn for losses from zero to here, at this number of points and bins."""


@dataclass(frozen=True)
class NoisyLabelsConfig:
    """Settings, the same for every method.

    Attributes:
        root: where the files of Fashion-MNIST are.
        download: fetch them there if need be.
        examples: training images.
        clean: images of the outer loss, with right labels.
        rate: share of training images with a wrong label (``flip2``).
        hidden: width of the classifier, 784-hidden-10.
        weight_net: width of the weight net, 1-weight_net-1.
        steps: T; λ moves at each of them.
        batch: images of an inner and of an outer batch.
        lr: learning rate of the inner SGD.
        momentum: its momentum.
        outer_lr: learning rate of λ's Adam.
        clip_norm: bound on the norm of each hypergradient; ``None``: none.
        evaluate_every: steps between two evaluations.
        squash: the weight net's output to weights.
    """

    root: Path = Path("data")
    download: bool = False
    examples: int = 10_000
    clean: int = 1_000
    rate: float = 0.4
    hidden: int = 128
    weight_net: int = 100
    steps: int = 2_000
    batch: int = 100
    lr: float = 0.01
    momentum: float = 0.9
    outer_lr: float = 1e-3
    clip_norm: float | None = None
    evaluate_every: int = 100
    squash: Squash = SigmoidAbove()

    @property
    def options(self) -> str:
        """The options common to all methods, in words."""
        clipping = "no clipping" if self.clip_norm is None else f"hypergradient norm at most {self.clip_norm:g}"
        return (
            f"{self.examples} training images, {self.rate:.0%} flip2 noise, {self.clean} clean images, MLP "
            f"784-{self.hidden}-10, SGD {self.lr:g} "
            f"momentum {self.momentum:g}, batches of {self.batch}, {self.steps} steps; weight net "
            f"1-{self.weight_net}-1, weights divided by their "
            f"sum over the batch, λ by Adam {self.outer_lr:g} at every step, {clipping}; accuracy after the last step"
        )


@dataclass(frozen=True, kw_only=True)
class NoisyLabelsRun(Run):
    """One run of one method; ``seconds`` are of the first stage, evaluations included.

    Attributes:
        accuracy: on the test images after the last step, in per cent; NaN if the run broke off.
        two_stage: the same of a second classifier, trained with the weight net as it was found; NaN
            where λ did not move.
        ratio: mean weight of the training images with the right label / of those with a wrong one,
            after the last step.
        curve: accuracy at every evaluation.
        ratios: ratio at every evaluation.
        weights: the weighting curve, for :data:`BINS` losses from 0 to :data:`HIGHEST_LOSS`.
        right_losses: histogram of the losses of images with the right label, after the last step;
            the last bin holds all higher ones.
        wrong_losses: of those with a wrong one.
    """

    accuracy: float
    two_stage: float
    ratio: float
    curve: list[float]
    ratios: list[float]
    weights: list[float]
    right_losses: list[float]
    wrong_losses: list[float]


@dataclass(frozen=True)
class Setting:
    """A configuration made ready for one seed.

    ``data.train`` holds the labels as they are given to the classifier.
    """

    config: NoisyLabelsConfig
    model: MetaWeightNet
    data: Data
    wrong: Tensor
    seed: int

    @property
    def training(self) -> Supervised:
        """Of a classifier, while λ moves or stays."""
        c = self.config
        return Supervised(
            step=inner_step(self.model.inner_loss, SGD(lr=c.lr, momentum=c.momentum)),
            outer_loss=self.model.outer_loss,
            train=self.data.train,
            validation=self.data.validation,
            batch=c.batch,
            steps=c.steps,
            optimizer=functools.partial(torch.optim.Adam, lr=c.outer_lr),
            clip_norm=c.clip_norm,
            seed=self.seed,
        )

    def accuracy(self, w: Tree, lam: Tree) -> float:
        """On the test images, in per cent."""
        return 100.0 * float(self.model.accuracy(w, lam, self.data.test))

    def losses(self, w: Tree) -> Tensor:
        """Of every training image, with the label that it was given."""
        with torch.no_grad():
            return self.model.loss(self.model.model(w, self.data.train.x), self.data.train.y)

    def ratio(self, lam: Tree, losses: Tensor) -> float:
        """Mean weight of the images with the right label, by that of those with a wrong one."""
        with torch.no_grad():
            weights = self.model.weights(lam, losses)
        return float(weights[~self.wrong].mean() / weights[self.wrong].mean())


def prepare(method: Method, config: NoisyLabelsConfig, seed: int) -> tuple[Setting, Tree, Tree]:
    """The setting, the classifier's initial weights, and λ.

    Deterministic in ``(config, seed)``, the same for every method.

    Raises:
        FileNotFoundError: if a file of Fashion-MNIST is missing.
        ValueError: if one is damaged, or if there are too few images.
    """
    parts = [_read(config, "train"), _read(config, "test")]
    if config.examples + config.clean > len(parts[0]):
        raise SettingError(
            f"{config.examples} + {config.clean} images were asked for, but there are {len(parts[0])}",
            "--examples",
            "--clean",
        )
    data = of_images(parts[0], parts[1], examples=config.examples, validation=config.clean, seed=seed)
    data = Data(*[Part(part.x.flatten(1), part.y) for part in data])
    classes = len(parts[0].names)
    given = label_noise.flip2(data.train.y, classes, config.rate, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Linear(data.train.x.shape[1], config.hidden), nn.ReLU(), nn.Linear(config.hidden, classes)
        )
        loss = functools.partial(cross_entropy, reduction="none")
        model = MetaWeightNet.of(
            net, loss, hidden=config.weight_net, squash=method.configured(config).squash, coefficients=batch_normalised
        )
    setting = Setting(config, model, data._replace(train=Part(data.train.x, given)), given != data.train.y, seed)
    return setting, *model.init()


def _read(config: NoisyLabelsConfig, part: Literal["train", "test"]) -> LabelledImages:
    reader = functools.partial(fashion_mnist, config.root, part, download=config.download)
    return fetched(reader, download=config.download)


def run(method: Method, config: NoisyLabelsConfig, seed: int) -> NoisyLabelsRun:
    """Both stages of one method; deterministic in ``(method, config, seed)``."""
    setting, w0, lam0 = prepare(method, config, seed)
    w = w0
    lam = lam0
    failure = ""
    curve: list[float] = []
    ratios: list[float] = []
    started = time.perf_counter()
    try:
        for t, w, lam in setting.training.run(w0, lam0, method.estimator):
            if t % config.evaluate_every == 0:
                curve.append(setting.accuracy(w, lam))
                ratios.append(setting.ratio(lam, setting.losses(w)))
    except FloatingPointError as error:
        failure = str(error)
    seconds = time.perf_counter() - started
    losses = setting.losses(w)
    two_stage = math.nan
    if method.estimator is not None and not failure:
        *_, (_, second, _) = setting.training.run(w0, lam, None)
        two_stage = setting.accuracy(second, lam)
    with torch.no_grad():
        weights = setting.model.weights(lam, torch.linspace(0, HIGHEST_LOSS, BINS))
    return NoisyLabelsRun(
        method=method.key,
        seed=seed,
        seconds=seconds,
        failure=failure,
        accuracy=math.nan if failure else setting.accuracy(w, lam),
        two_stage=two_stage,
        ratio=math.nan if failure else setting.ratio(lam, losses),
        curve=curve,
        ratios=ratios,
        weights=weights.tolist(),
        right_losses=_histogram(losses[~setting.wrong]),
        wrong_losses=_histogram(losses[setting.wrong]),
    )


def _histogram(losses: Tensor) -> list[float]:
    return torch.histc(losses.clamp(0, HIGHEST_LOSS), BINS, 0, HIGHEST_LOSS).tolist()
