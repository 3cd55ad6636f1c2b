"""``python -m benchmarks.forward``: FMD against a loop of jvps, 30 hyperparameters, side by side, one thread.

The loop is forward mode as one would write it with the step alone: ``step.jvp`` (reverse mode
twice) once per column and inner step, or ``torch.func.jvp`` of the gradient (forward over reverse).
All give the same numbers (checked in float64 first). Hyperparameters: a weight and a label shift
for each of ten examples or classes, and ten learning rates in turn.
"""

import argparse
import statistics
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import metaopt as mo
from benchmarks import measure
from benchmarks.problems import PROBLEMS
from metaopt import tree
from metaopt.estimators.forward import basis_of
from metaopt.inner._update import push_forward


class Case(NamedTuple):
    step: mo.inner.InnerStep
    outer_loss: Any
    w0: dict[str, Tensor]
    lam: dict[str, Tensor]
    batches: list[Any]
    outer_batch: Any


def sinusoid(weights: list[str] | None, T: int, dtype: torch.dtype) -> Case:
    """The sinusoid net, ten examples with weights and label shifts."""
    made = PROBLEMS["sinusoid"].make(T, dtype)
    model = mo.functional(made.module)
    w0, rest = mo.partition(model.params, weights=weights) if weights else (model.params, {})
    x, y = made.batches[0]

    def loss(w: Any, lam: Any, batch: Any) -> Tensor:
        return (lam["weights"] * (model(mo.merge(w, rest), x) - y - lam["shifts"]).pow(2)[:, 0]).mean()

    def outer_loss(w: Any, lam: Any, batch: Any) -> Tensor:
        return nn.functional.mse_loss(model(mo.merge(w, rest), batch[0]), batch[1])

    lam = {
        "weights": torch.ones(10, dtype=dtype),
        "shifts": torch.zeros(10, 1, dtype=dtype),
        "lr": torch.full((10,), 0.01, dtype=dtype),
    }
    optimizer = mo.optim.SGD(lr=mo.optim.schedules.piecewise(lambda lam: lam["lr"], T), momentum=0.9)
    return Case(mo.inner_step(loss, optimizer), outer_loss, w0, lam, [None] * T, made.outer_batch)


def conv(weights: list[str] | None, T: int, dtype: torch.dtype) -> Case:
    """ANIL's net on ten classes: a weight and a logit shift per class."""
    made = PROBLEMS["conv_anil"].make(T, dtype)
    model = mo.functional(made.module)
    w0, rest = mo.partition(model.params, weights=weights) if weights else (model.params, {})

    def loss(w: Any, lam: Any, batch: Any) -> Tensor:
        x, y = batch
        losses = nn.functional.cross_entropy(model(mo.merge(w, rest), x) + lam["shifts"], y, reduction="none")
        return (lam["weights"][y] * losses).mean()

    def outer_loss(w: Any, lam: Any, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(mo.merge(w, rest), batch[0]), batch[1])

    lam = {
        "weights": torch.ones(10, dtype=dtype),
        "shifts": torch.zeros(10, dtype=dtype),
        "lr": torch.full((10,), 0.01, dtype=dtype),
    }
    optimizer = mo.optim.SGD(lr=mo.optim.schedules.piecewise(lambda lam: lam["lr"], T), momentum=0.9)
    return Case(mo.inner_step(loss, optimizer), outer_loss, w0, lam, made.batches, made.outer_batch)


CASES = {
    "sinusoid net, last layer, T=30": (lambda dtype: sinusoid(["6.*"], 30, dtype)),
    "sinusoid net, all weights, T=10": (lambda dtype: sinusoid(None, 10, dtype)),
    "conv net, ANIL's split, T=3": (lambda dtype: conv(["12.*", "13.*", "17.*"], 3, dtype)),
    "conv net, all weights, T=1": (lambda dtype: conv(None, 1, dtype)),
    "conv net, all weights, T=3": (lambda dtype: conv(None, 3, dtype)),
}


def by_fmd(case: Case, columns_at_once: int | None = None) -> Any:
    return mo.hypergradient(*case, estimator=mo.FMD(columns_at_once)).indirect


def by_loop(case: Case) -> Any:
    step, outer_loss, w0, lam, batches, outer_batch = case
    state = step.init(w0, lam)
    basis = basis_of(lam)
    directions = [tree.select(basis, i) for i in range(30)]
    columns = [tree.zeros_like(state)] * len(directions)
    for batch in batches:
        columns = [
            step.jvp(state, lam, batch, column, direction)
            for column, direction in zip(columns, directions, strict=True)
        ]
        state = step(state, lam, batch)
    return against(outer_loss, state, lam, outer_batch, columns)


def against(outer_loss: Any, state: mo.InnerState, lam: Any, outer_batch: Any, columns: list[mo.InnerState]) -> Tensor:
    w = tree.attach(state.w)
    alpha = tree.unflatten(torch.autograd.grad(outer_loss(w, lam, outer_batch), tree.leaves(w)), tree.flatten(w)[1])
    return torch.stack([tree.dot(alpha, column.w) for column in columns])


def by_forward_mode(case: Case) -> Any:
    """The same loop with torch's forward mode over the gradient."""
    step, outer_loss, w0, lam, batches, outer_batch = case
    state = step.init(w0, lam)
    basis = basis_of(lam)
    directions = [tree.select(basis, i) for i in range(30)]
    columns = [tree.zeros_like(state)] * len(directions)
    for batch in batches:
        moved = []
        for column, direction in zip(columns, directions, strict=True):
            gradient = torch.func.grad(step.inner_loss)
            g, g_dot = torch.func.jvp(
                lambda w, lam, gradient=gradient, batch=batch: gradient(w, lam, batch),
                (state.w, lam),
                (column.w, direction),
            )
            moved.append(
                mo.InnerState(*push_forward(step.optimizer, g, state, lam, g_dot, column, direction), state.t + 1)
            )
        columns = moved
        state = step(state, lam, batch)
    return against(outer_loss, state, lam, outer_batch, columns)


def flat(values: Any) -> Tensor:
    return torch.cat([leaf.flatten() for leaf in tree.leaves(values)])


ENGINES = {
    "a loop of jvps": by_loop,
    "the same, torch.func.jvp": by_forward_mode,
    "FMD": by_fmd,
    "FMD, one product after the other": lambda case: by_fmd(case, 1),
    "FMD, all products at once": lambda case: by_fmd(case, 30),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forward", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="the cases whose names contain this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name, make in ((name, make) for name, make in CASES.items() if arguments.only in name):
        torch.manual_seed(0)
        case = make(torch.float64)
        difference = max(
            float((flat(by_fmd(case)) - flat(loop(case))).abs().max()) for loop in (by_loop, by_forward_mode)
        )
        case = make(torch.float32)
        times = measure.seconds({engine: partial(run, case) for engine, run in ENGINES.items()}, arguments.rounds)
        print(f"{name} (largest difference in float64: {difference:.0e})")
        for engine, own in times.items():
            ratio = measure.ratio(times, "a loop of jvps", engine)
            print(
                f"  {engine:34} {1e3 * statistics.median(own):9.1f} ms   {ratio:5.1f} x as fast as the loop", flush=True
            )


if __name__ == "__main__":
    main()
