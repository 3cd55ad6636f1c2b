"""What each training example is worth: exact reverse mode through thousands of steps, with data weights as λ.

λ holds one weight per training example, all 1. One sweep through a whole training run gives
``dL_val/dλ_i`` for every example at once: to first order, what leaving example i out does to the
validation loss is ``-dL_val/dλ_i``. Checked against really leaving it out: every example's run is
repeated with its weight at 0, all of them stacked into one problem. The recipe at scale (REPLAY:
Engstrom et al. 2025, "Optimizing ML training with metagradient descent", `arXiv 2503.13751
<https://arxiv.org/abs/2503.13751>`__) is the same call with binomial checkpoints, so that T steps
need about log T states.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from metaopt import tree
from metaopt.estimators import RMD, Hypergradient, hypergradient
from metaopt.experiments.pictures import RIGHT, WRONG, panels, save
from metaopt.files import write_text
from metaopt.functional import FunctionalModel, functional
from metaopt.inner import Step, inner_step
from metaopt.meta import replicated
from metaopt.optim import SGD
from metaopt.trajectory import Checkpointed
from metaopt.tree import Tree


@dataclass(frozen=True)
class DataWeightsConfig:
    """Two noisy half-moons, some labels flipped, and a tanh network trained by minibatch SGD with momentum.

    Attributes:
        examples: training examples, and as many hyperparameters.
        validation: validation examples (clean).
        flipped: share of training labels that are wrong.
        hidden: width of the network.
        steps: T.
        batch: examples per minibatch.
        lr: learning rate.
        momentum: momentum.
        weight_decay: weight decay.
        slots: states held at a time.
        seed: of the data, the network and the order of the minibatches.
    """

    examples: int = 100
    validation: int = 200
    flipped: float = 0.15
    hidden: int = 16
    steps: int = 5000
    batch: int = 20
    lr: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 1e-2
    slots: int = 30
    seed: int = 0


class DataWeightsResult(NamedTuple):
    """What came out.

    Attributes:
        spearman: rank correlation of predicted and true effects of leaving an example out.
        predicted: ``-dL_val/dλ_i``.
        true: ``L_val(without i) - L_val``.
        flipped: whether example i's label is wrong.
        validation_loss: with all examples.
        gradient_seconds: one training run and the sweep: all predictions.
        retraining_seconds: all the retrainings.
        cost: of the sweep, by kind.
    """

    spearman: float
    predicted: list[float]
    true: list[float]
    flipped: list[bool]
    validation_loss: float
    gradient_seconds: float
    retraining_seconds: float
    cost: dict[str, int]


class Setting(NamedTuple):
    """The training of one seed, made ready; a batch is ``(x, y, which examples)``."""

    step: Step
    model: FunctionalModel
    x: Tensor
    y: Tensor
    flipped: Tensor
    validation: tuple[Tensor, Tensor]
    order: Tensor

    def batch(self, t: int) -> tuple[Tensor, Tensor, Tensor]:
        """The minibatch of step t = 1 … T."""
        chosen = self.order[t - 1]
        return self.x[chosen], self.y[chosen], chosen


def run(config: DataWeightsConfig, out: Path | None = None) -> DataWeightsResult:
    """Predict every example's effect by one sweep, then measure it.

    Write ``data_weights.json`` and ``.png`` to ``out`` if given.
    """
    setting = build(config)
    started = time.perf_counter()
    estimate = predict(setting, config)
    swept = time.perf_counter()
    base, without = retrain(setting, config)
    finished = time.perf_counter()
    predicted = -estimate.total
    true = without - base
    result = DataWeightsResult(
        spearman=float(spearmanr(predicted.numpy(), true.numpy()).statistic),  # type: ignore[attr-defined]
        predicted=predicted.tolist(),
        true=true.tolist(),
        flipped=setting.flipped.tolist(),
        validation_loss=float(estimate.outer_loss),
        gradient_seconds=swept - started,
        retraining_seconds=finished - swept,
        cost=vars(estimate.cost),
    )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        found = {"config": vars(config), **result._asdict()}
        write_text(out / "data_weights.json", json.dumps(found, indent=1) + "\n")
        draw(result, out / "data_weights.png")
    return result


def build(config: DataWeightsConfig) -> Setting:
    """Data, network, order of minibatches, and the weighted training step; float64 throughout."""
    source = torch.Generator().manual_seed(config.seed)
    x, y = _half_moons(config.examples, source)
    wrong = torch.zeros(config.examples, dtype=torch.bool)
    wrong[torch.randperm(config.examples, generator=source)[: round(config.flipped * config.examples)]] = True
    order = torch.stack(
        [torch.randperm(config.examples, generator=source)[: config.batch] for _ in range(config.steps)]
    )
    model = _network(config.hidden, source)

    def training_loss(w: Tree, weights: Tensor, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        inputs, targets, chosen = batch
        losses = nn.functional.softplus(-targets * model(w, inputs).squeeze(-1))
        return (weights[chosen] * losses).mean()

    return Setting(
        inner_step(training_loss, _optimizer(config)),
        model,
        x,
        torch.where(wrong, -y, y),
        wrong,
        _half_moons(config.validation, source),
        order,
    )


def predict(setting: Setting, config: DataWeightsConfig) -> Hypergradient:
    """The exact hypergradient with respect to every example's weight."""
    estimator = RMD(Checkpointed(slots=config.slots, horizon=config.steps))
    lam = torch.ones(config.examples, dtype=torch.float64)
    return hypergradient(
        setting.step,
        _validation_loss(setting),
        setting.model.params,
        lam,
        setting.batch,
        setting.validation,
        estimator=estimator,
        horizon=config.steps,
    )


def retrain(setting: Setting, config: DataWeightsConfig) -> tuple[Tensor, Tensor]:
    """``(L_val, L_val without example i for every i)``.

    All runs at once, as one stacked problem with a row of weights for each.
    """
    n = config.examples
    weights = torch.cat([torch.ones(1, n, dtype=torch.float64), 1 - torch.eye(n, dtype=torch.float64)])
    mapped = torch.vmap(setting.step.loss, in_dims=(0, 0, None))
    step = inner_step(lambda w, lam, batch: mapped(w, lam, batch).sum(), _optimizer(config))
    state = step.init(replicated(setting.model.params, n + 1), weights)
    for t in range(1, config.steps + 1):
        state = step(state, weights, setting.batch(t))
    validation = _validation_loss(setting)
    losses = torch.stack([validation(tree.select(state.w, i), None, setting.validation) for i in range(n + 1)])
    return losses[0], losses[1:]


def draw(result: DataWeightsResult, path: Path) -> None:
    """Predicted against true effect, one point per example."""
    figure, ((axes,),) = panels(5, 5)
    for wrong, colour, label in ((False, RIGHT, "right label"), (True, WRONG, "flipped label")):
        chosen = [i for i, flipped in enumerate(result.flipped) if flipped == wrong]
        axes.scatter(
            [result.predicted[i] for i in chosen], [result.true[i] for i in chosen], s=12, color=colour, label=label
        )
    axes.axline((0, 0), slope=1, color="grey", linewidth=0.8)
    axes.set(
        xlabel="predicted by one sweep",
        ylabel="measured by retraining",
        title=f"effect of leaving an example out: rank correlation {result.spearman:.3f}",
    )
    axes.legend()
    save(figure, path)


def _optimizer(config: DataWeightsConfig) -> SGD:
    return SGD(lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)


def _validation_loss(setting: Setting) -> Callable[[Tree, Tree, Any], Tensor]:
    def loss(w: Tree, _: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        return nn.functional.softplus(-targets * setting.model(w, inputs).squeeze(-1)).mean()

    return loss


def _half_moons(count: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    angle = torch.pi * torch.rand(count, generator=source, dtype=torch.float64)
    y = torch.where(torch.arange(count) % 2 == 0, 1.0, -1.0).double()
    x = torch.stack([y * angle.cos() + 0.5 * (1 - y), y * angle.sin() + 0.25 * (1 - y)], 1)
    return x + 0.2 * torch.randn(x.shape, generator=source, dtype=torch.float64), y


def _network(hidden: int, source: torch.Generator) -> FunctionalModel:
    with torch.random.fork_rng(devices=[]):
        model = functional(nn.Sequential(nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, 1)).double())
    for name, parameter in model.params.items():
        fan_in = 2 if name.startswith("0") else hidden
        model.params[name] = torch.randn(parameter.shape, generator=source, dtype=torch.float64) / fan_in**0.5
    return model
