"""One training run on labelled examples during which λ moves or stays, as the experiments on one data set do it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from metaopt.estimators import Estimator, EvoGrad, HyperDistill
from metaopt.estimators.outer import OuterLoss
from metaopt.experiments.schedules import Part
from metaopt.inner import Step
from metaopt.meta import online
from metaopt.meta.outer_optimizer import MakesOptimizer
from metaopt.tree import Tree


@dataclass(frozen=True)
class Supervised:
    """The training: Φ, the outer loss, and minibatches of both.

    Attributes:
        step: Φ.
        outer_loss: ``(w, lam, batch) -> scalar``.
        train: examples of the inner batches.
        validation: examples of the outer batches.
        batch: examples of a batch.
        steps: T.
        optimizer: of λ, which moves at every step.
        clip_norm: bound on the norm of each hypergradient; ``None``: none.
        seed: of the order of the batches.
    """

    step: Step
    outer_loss: OuterLoss
    train: Part
    validation: Part
    batch: int
    steps: int
    optimizer: MakesOptimizer
    clip_norm: float | None = None
    seed: int = 0

    def batches(self, t: int) -> Part:
        """The training batch of step t = 1 … T."""
        return shuffled(self.train, t, self.batch, 2 * self.seed)

    def outer_batches(self, t: int) -> Part:
        """The validation batch of step t."""
        return shuffled(self.validation, t, self.batch, 2 * self.seed + 1)

    def run(self, w: Tree, lam: Tree, estimator: Estimator | None) -> Iterator[tuple[int, Tree, Tree]]:
        """``(t, w, λ)`` after every step; without an estimator λ stays.

        Raises:
            FloatingPointError: if a loss or hypergradient is not finite.
        """
        if estimator is None:
            state = self.step.init(w, lam)
            for t in range(1, self.steps + 1):
                state = self.step(state, lam, self.batches(t))
                yield t, state.w, lam
            return
        reports = online(
            self.step,
            self.outer_loss,
            w,
            lam,
            self.batches,
            self.outer_batches,
            estimator=seeded(estimator, self.seed),
            optimizer=self.optimizer,
            horizon=self.steps,
            clip_norm=self.clip_norm,
        )
        for report in reports:
            yield report.number, report.state.w, report.lam


def shuffled(part: Part, t: int, size: int, stream: int) -> Part:
    """Batch t = 1, 2, … of an endless walk through ``part``, in a new random order each time round.

    Streams are independent.
    """
    around = max(1, len(part.y) // size)
    number, place = divmod(t - 1, around)
    seed = 1_000_003 * (stream + 1) + number
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(part.y), generator=generator)
    chosen = order[place * size : (place + 1) * size]
    return Part(part.x[chosen], part.y[chosen])


def seeded(estimator: Estimator, seed: int) -> Estimator:
    """The estimator with this seed, if it draws anything."""
    if isinstance(estimator, HyperDistill | EvoGrad):
        return replace(estimator, seed=seed)
    return estimator
