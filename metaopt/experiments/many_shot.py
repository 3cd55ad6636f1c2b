"""Many-shot image classification: section 5 of the HyperDistill paper (tables 2, 3, 6; figures 2, 5, 6, 11-13).

Tasks are 10-way episodes over classes that training never saw. Three meta-models: ANIL, WarpGrad, MetaWeightNet. The weights adapt for
T = 100 steps of momentum SGD with cropping and flipping, λ moves online by SGD, the initial weights by Reptile.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy

from metaopt.estimators import IFT, RMD, DrMAD, Estimator, FirstOrder, HyperDistill, OneStep
from metaopt.experiments.image_data import Source, Splits, load
from metaopt.inner import SGD, ConstantSlots, Step, inner_step
from metaopt.linsolve import Neumann
from metaopt.meta import FOMAML, Checkpoint, HyperSteps, MetaTask, MetaTraining, Outer, Reptile, looped, replicated
from metaopt.models import ANIL, MetaModel, MetaWeightNet, SigmoidAbove, WarpGrad, conv_net
from metaopt.tasks import Episodes, label_noise
from metaopt.tree import Tree


class Method(NamedTuple):
    """A row of the table.

    Attributes:
        key: its name on the command line.
        title: its name in the table.
        estimator: the estimator.
        last: λ moves during the last so many inner steps only, at each of them; ``None``: during all, every ``hyper_interval`` steps.
        paper: accuracy in table 2, in the order of :data:`PAPER_COLUMNS`.
    """

    key: str
    title: str
    estimator: Estimator
    last: int | None = None
    paper: tuple[str, str, str] = ("–", "–", "–")


PAPER_COLUMNS = ("anil", "warpgrad", "meta-weight-net")
"""ANIL on TinyImageNet, WarpGrad on CIFAR100, MetaWeightNet on CIFAR100."""

RATE = 0.01
"""The inner learning rate, which is also the rate of the Neumann series."""


def hyperdistill(gamma: float, pi: Any = "theta") -> Method:
    """HyperDistill with this γ; π = 1 in appendix I and for MetaWeightNet."""
    name = "hyperdistill" if pi == "theta" else "hyperdistill-pi1"
    title = "HyperDistill" if pi == "theta" else "HyperDistill, π = 1"
    return Method(f"{name}-{gamma:g}", f"{title}, γ = {gamma:g}", HyperDistill(gamma=gamma, pi=pi, example_axis=1))


METHODS = (
    Method("fo", "FO", FirstOrder(), paper=("53.62 ± .06", "58.16 ± .52", "N/A")),
    Method("one-step", "1-step", OneStep(), paper=("53.90 ± .43", "58.18 ± .52", "58.45 ± .40")),
    Method("drmad", "DrMAD", DrMAD(), paper=("49.84 ± 1.35", "55.13 ± .64", "57.03 ± .42")),
    Method("ift-2-25", "N.IFT(2, 25)", IFT(Neumann(2, rate=RATE), converged=None, solved=None), last=25),
    Method(
        "ift-5-10",
        "N.IFT(5, 10)",
        IFT(Neumann(5, rate=RATE), converged=None, solved=None),
        last=10,
        paper=("53.76 ± .31", "58.88 ± .65", "59.34 ± .27"),
    ),
    Method("ift-10-5", "N.IFT(10, 5)", IFT(Neumann(10, rate=RATE), converged=None, solved=None), last=5),
    hyperdistill(0.9),
    hyperdistill(0.99)._replace(paper=("56.37 ± .27", "60.91 ± .27", "60.82 ± .33")),
    hyperdistill(0.999),
    hyperdistill(0.9999),
    *(hyperdistill(gamma, "plain") for gamma in (0.0, 0.9, 0.99, 0.999, 0.9999)),
    Method("rmd", "RMD (exact), offline", RMD()),
)

TABLE_2 = ("fo", "one-step", "drmad", "ift-5-10", "hyperdistill-0.99")
"""What is compared by default."""

TABLE_2_WEIGHTS = ("one-step", "drmad", "ift-5-10", "hyperdistill-pi1-0.99")
"""The same for MetaWeightNet, whose direct term is zero, so that FO does nothing and the paper sets π = 1."""


@dataclass(frozen=True)
class ManyShotConfig:
    """Settings; the defaults are the paper's.

    Attributes:
        model: ``"anil"``, ``"warpgrad"`` or ``"meta-weight-net"``.
        source: where the images come from.
        meta_iterations: M, inner runs of meta-training.
        horizon: T, inner steps of a run.
        meta_batch: tasks of a run.
        ways: classes of a task.
        shots: training images (and test images) of a class.
        batch_size: images of a batch.
        channels: of every convolution.
        inner_lr: learning rate of the inner SGD (momentum 0.9).
        outer_lr: learning rate of λ's SGD (momentum 0.9), linearly to 0 over the M runs.
        hyper_interval: λ moves at every such inner step.
        clip_norm: bound on the norm of each hypergradient, averaged over tasks; ``None``: none.
        constant_momentum: hold the momentum buffer constant in A.
        calibration_period: runs between fits of HyperDistill's θ.
        initialisation: ``"reptile"`` or ``"fomaml"``.
        corruption: probability of a random label (MetaWeightNet: 0.4).
        validate_every: runs between meta-validations (figure 5); 0: never.
        validation_tasks: tasks of a meta-validation.
        test_tasks: tasks of the meta-test.
    """

    model: str = "warpgrad"
    source: Source = Source("cifar100")
    meta_iterations: int = 1000
    horizon: int = 100
    meta_batch: int = 4
    ways: int = 10
    shots: int = 250
    batch_size: int = 100
    channels: int = 32
    inner_lr: float = RATE
    outer_lr: float = 1e-3
    hyper_interval: int = 2
    clip_norm: float | None = None
    constant_momentum: bool = False
    calibration_period: int = 50
    initialisation: str = "reptile"
    corruption: float = 0.0
    validate_every: int = 50
    validation_tasks: int = 20
    test_tasks: int = 500

    @property
    def options(self) -> str:
        """The options common to all methods, in words."""
        clipping = "no clipping" if self.clip_norm is None else f"hypergradient norm at most {self.clip_norm:g}"
        momentum = "held constant in A" if self.constant_momentum else "differentiated"
        return (
            f"{clipping}, momentum {momentum}, hyper-steps every {self.hyper_interval} inner steps (N.IFT: each of the last), calibration every "
            f"{self.calibration_period} runs, {self.initialisation}, λ by SGD {self.outer_lr:g}"
        )


def configure(
    model: str, source: Source, *, small: bool = False, stable: bool = True, fomaml: bool = False, meta_iterations: int | None = None
) -> ManyShotConfig:
    """The paper's settings for a model and data set, or the profile for two cores.

    Args:
        model: ``"anil"``, ``"warpgrad"`` or ``"meta-weight-net"``.
        source: the data.
        small: 14×14 pixels, 16 channels, 50 + 50 images a class, batches of 32, M = 10, a λ learning rate ten times the paper's.
        stable: for every method, clip the hypergradient's norm to 1 and hold the momentum buffer constant in A; else as printed.
        fomaml: FOMAML instead of Reptile.
        meta_iterations: M, where it differs.
    """
    weights = model == "meta-weight-net"
    config = ManyShotConfig(
        model=model,
        source=source,
        inner_lr=0.1 if weights else RATE,
        outer_lr=0.01 if weights else 1e-3,
        corruption=0.4 if weights else 0.0,
        clip_norm=1.0 if stable else None,
        constant_momentum=stable,
        initialisation="fomaml" if fomaml else "reptile",
    )
    if small:
        config = replace(
            config,
            source=replace(source, size=source.size or 14),
            channels=16,
            shots=50,
            batch_size=32,
            meta_iterations=10,
            outer_lr=10 * config.outer_lr,
            validate_every=5,
            validation_tasks=4,
            test_tasks=24,
        )
    return replace(config, meta_iterations=meta_iterations or config.meta_iterations)


class ManyShotRun(NamedTuple):
    """One meta-training run of one method, and its meta-test.

    Attributes:
        method: key of the method.
        seed: of the initial weights and of all tasks.
        accuracy: on test images of unseen classes, mean over the meta-test's tasks; NaN if the run broke off.
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
        return looped(self.model.outer_loss)(w, lam, batch) / len(batch[0])

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
        return Episodes(data, c.ways, c.shots, c.shots, c.batch_size, crop=crop, flip=flip, corruption=corruption, rate=c.corruption)


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
    net = functools.partial(conv_net, channels=config.channels, classes=config.ways, in_channels=shape[0], image_size=shape[-1])
    if config.model == "anil":
        return ANIL.of(net(blocks=4), weights=["block4.*", "head.*"], loss=cross_entropy)
    if config.model == "warpgrad":
        return WarpGrad.of(net(blocks=3), loss=cross_entropy)
    if config.model == "meta-weight-net":
        return MetaWeightNet.of(net(blocks=3), functools.partial(cross_entropy, reduction="none"), hidden=200, squash=SigmoidAbove(0.1))
    raise ValueError(f"no meta-model is called {config.model!r}; there are {', '.join(PAPER_COLUMNS)}")


def run(method: Method, config: ManyShotConfig, seed: int, folder: Path | None = None) -> ManyShotRun:
    """Meta-train and meta-test once; deterministic in ``(method, config, seed)``.

    Args:
        method: the row.
        config: the settings.
        seed: of everything.
        folder: where the run's state is kept after each inner run; a run that was broken off goes on from there, a finished one is read.

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
        scheduler=functools.partial(torch.optim.lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.0, total_iters=config.meta_iterations),
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
    accuracies = [] if failure else list(setting.accuracies(phi, outer.lam, setting.splits.test, config.test_tasks, _TEST))
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
        setting.step, setting.outer_loss, method.estimator, c.horizon, hyper_steps, initialisation, calibration_period=c.calibration_period
    )


def _earlier(path: Path | None, config: ManyShotConfig) -> tuple[Checkpoint | None, dict[str, Any]]:
    """Where an earlier call had got to, and its notes; fresh notes otherwise."""
    fresh = {"config": asdict(config), "curve": [], "validation": [], "theta": [], "products": 0, "seconds": 0.0, "clock": 0.0}
    if path is None or not path.exists():
        return None, fresh
    found = Checkpoint.load(path)
    if found.notes["config"] != fresh["config"]:
        different = [key for key, value in fresh["config"].items() if found.notes["config"].get(key) != value]
        raise ValueError(f"{path} holds a run with other settings ({', '.join(different)}); choose another --out, or remove it")
    return found, found.notes


def _noted(notes: dict[str, Any], setting: Setting, report: Any) -> dict[str, Any]:
    """The notes after one more inner run. A meta-validation is not counted as time."""
    seconds = notes["seconds"] + time.perf_counter() - notes["clock"]
    c, validation = setting.config, notes["validation"]
    if c.validate_every and report.run % c.validate_every == 0:
        found = list(setting.accuracies(report.phi, report.lam, setting.splits.validation, c.validation_tasks, _VALIDATION))
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
