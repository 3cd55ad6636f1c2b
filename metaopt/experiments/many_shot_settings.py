"""What the many-shot experiments are run with: their methods and their configuration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from metaopt.estimators import IFT, RMD, DrMAD, FirstOrder, HyperDistill, OneStep
from metaopt.experiments.experiment import Method
from metaopt.experiments.image_data import Source
from metaopt.linsolve import Neumann
from metaopt.meta import HyperSteps

MODELS = ("anil", "warpgrad", "meta-weight-net")

PAPERS_DATA = {"anil": "tinyimagenet", "warpgrad": "cifar100", "meta-weight-net": "cifar100"}
"""The data of table 2; the published accuracies are shown beside runs on the same data only."""

RATE = 0.01
"""The inner learning rate, which is also the rate of the Neumann series."""


def table_2(anil: str, warpgrad: str, meta_weight_net: str) -> dict[str, str]:
    """Published accuracies by model."""
    return {"anil": anil, "warpgrad": warpgrad, "meta-weight-net": meta_weight_net}


def neumann(terms: int, last: int, paper: dict[str, str] | str = "–") -> Method:
    """Implicit differentiation by N terms; λ moves during the last n inner steps only."""
    return Method(
        f"ift-{terms}-{last}",
        f"N.IFT({terms}, {last})",
        IFT(Neumann(terms, rate=RATE), converged=None, solved=None),
        paper=paper,
        settings={"hyper_steps": HyperSteps(last=last)},
    )


def hyperdistill(gamma: float, pi: Any = "theta", paper: dict[str, str] | str = "–") -> Method:
    """HyperDistill with this γ; π = 1 in appendix I and for MetaWeightNet."""
    name = "hyperdistill" if pi == "theta" else "hyperdistill-pi1"
    title = "HyperDistill" if pi == "theta" else "HyperDistill, π = 1"
    estimator = HyperDistill(gamma=gamma, pi=pi)
    return Method(f"{name}-{gamma:g}", f"{title}, γ = {gamma:g}", estimator, paper=paper)


METHODS = (
    Method("fo", "FO", FirstOrder(), paper=table_2("53.62 ± .06", "58.16 ± .52", "N/A")),
    Method("one-step", "1-step", OneStep(), paper=table_2("53.90 ± .43", "58.18 ± .52", "58.45 ± .40")),
    Method("drmad", "DrMAD", DrMAD(), paper=table_2("49.84 ± 1.35", "55.13 ± .64", "57.03 ± .42")),
    neumann(2, last=25),
    neumann(5, last=10, paper=table_2("53.76 ± .31", "58.88 ± .65", "59.34 ± .27")),
    neumann(10, last=5),
    hyperdistill(0.9),
    hyperdistill(0.99, paper=table_2("56.37 ± .27", "60.91 ± .27", "60.82 ± .33")),
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
        hyper_steps: when λ moves.
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
    hyper_steps: HyperSteps = HyperSteps(every=2)
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
            f"{clipping}, momentum {momentum}, hyper-steps at {self._when}, calibration every "
            f"{self.calibration_period} runs, {self.initialisation}, λ by SGD {self.outer_lr:g}"
        )

    @property
    def _when(self) -> str:
        if self.hyper_steps.last is not None:
            return f"each of the last {self.hyper_steps.last} inner steps"
        return f"every {self.hyper_steps.every} inner steps"


def configure(
    model: str,
    source: Source,
    *,
    small: bool = False,
    stable: bool = True,
    fomaml: bool = False,
    meta_iterations: int | None = None,
    shots: int | None = None,
    ways: int | None = None,
) -> ManyShotConfig:
    """The paper's settings for a model and data set, or the profile for two cores.

    Args:
        model: ``"anil"``, ``"warpgrad"`` or ``"meta-weight-net"``.
        source: the data.
        small: 14×14 pixels, 16 channels, 50 + 50 images a class, batches of 32, M = 10, a λ
            learning rate ten times the paper's.
        stable: for every method, clip the hypergradient's norm to 1 and hold the momentum buffer
            constant in A; else as printed.
        fomaml: FOMAML instead of Reptile.
        meta_iterations: M, where it differs.
        shots: training images of a class, where they differ; a batch never has more images than a
            task.
        ways: classes of a task, where they differ.
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
    ways = ways or config.ways
    shots = shots or config.shots
    return replace(
        config,
        meta_iterations=meta_iterations or config.meta_iterations,
        ways=ways,
        shots=shots,
        batch_size=min(config.batch_size, ways * shots),
    )
