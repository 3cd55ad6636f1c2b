"""Writes ``docs/estimators.md``.

Which estimator? From the estimators' own properties, and from what is counted and measured on a
small problem.

python docs/estimators.py
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from cases import ESTIMATORS  # noqa: E402

import metaopt as mo  # noqa: E402
from metaopt.verify.memory import peak_bytes  # noqa: E402

TARGET = ROOT / "docs" / "estimators.md"

INTRODUCTION = """# Which estimator?

Written by `python docs/estimators.py` from the estimators' own properties and from counts and measurements; a test runs it again and compares.
`mo.diagnose.suggest_estimator(...)` chooses for the sizes of your problem and says why.

The HyperDistill paper (arXiv 2110.02508, table 1) asks four things of a method, which are the first four columns:

- **large λ**: neither its cost nor its noise grows with the number of hyperparameters.
- **online**: λ may move between inner steps.
- **constant memory**: what it holds does not grow with the number T of inner steps (measured). Where it does grow, checkpoints bound it:
  `mo.RMD(mo.trajectory.Checkpointed(slots))` gives the same numbers, and so do `Offloaded` and `Budgeted`; `Reversible` does up to rounding.
- **horizon > 1**: it takes in how earlier steps depended on λ; **sees** says which part of the run.

**Cost** is that of one hypergradient after T inner steps, counted: evaluations of the inner gradient (the run's own T included), vector-Jacobian
products (what the papers call JVPs), Jacobian-vector products, losses. **Memory** is the growth of the peak, in copies of the weights: per inner
step, and per hyperparameter. **Bias** is where the expectation differs from the exact hypergradient.

"""

CLAIMS = """
All rows are held to their own formula by `metaopt verify`. K is 2 for the windowed and truncated methods, N is 5 for the Neumann series, and
there are 2 pairs or directions where a method draws them; the counts grow in proportion.
"""


def expense(make: Callable[[int], mo.Estimator], T: int, size: int = 4) -> tuple[mo.Cost, int]:
    """What is counted, and the peak in bytes, at ``T`` steps and ``size`` hyperparameters of 4,096 weights."""
    torch.manual_seed(0)
    w0 = torch.randn(4096)
    target = torch.randn(4096)
    lam = torch.zeros(size)

    def inner_loss(w, lam, batch):
        return 0.5 * ((w.view(size, -1) * lam.exp().unsqueeze(1)).tanh() - batch.view(size, -1)).square().mean()

    step = mo.inner_step(inner_loss, mo.optim.SGD(lr=0.5))
    counted: list[mo.Cost] = []

    def once() -> None:
        run = (
            step,
            lambda w, lam, batch: (w - batch).square().mean() + 1e-3 * lam.square().sum(),
            w0,
            lam,
            [target] * T,
            target,
        )
        counted.append(mo.hypergradient(*run, estimator=make(T)).cost)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an unused direct term and the like: nothing is used here but the counts
        once()
        peak = peak_bytes(once)
    return counted[0], peak


def law(at: Callable[[int], int], unit: str) -> str:
    """``a + bT`` through two horizons, in words; empty where it is zero throughout."""
    first = at(8)
    second = at(16)
    slope = (second - first) / 8
    constant = first - 8 * slope
    text = {0.0: "", 1.0: "T"}.get(slope, f"{slope:g}T")
    if constant:
        text = f"{text} {'+' if constant > 0 else '-'} {abs(constant):g}" if text else f"{constant:g}"
    return f"{text} {unit}" if text else ""


def cost_of(make: Callable[[int], mo.Estimator]) -> str:
    """The counts as laws in T."""
    costs = {T: expense(make, T)[0] for T in (8, 16)}
    parts = (
        law(lambda T: costs[T].steps + costs[T].linearizations, "gradients"),
        law(lambda T: costs[T].products, "products"),
        law(lambda T: costs[T].tangents, "tangents"),
        law(lambda T: costs[T].losses, "losses"),
    )
    return ", ".join(part for part in parts if part)


def growth(make: Callable[[int], mo.Estimator]) -> tuple[float, float]:
    """Growth of the peak per inner step, and per hyperparameter, in copies of the weights; to a tenth."""
    copy = 4 * 4096
    by_step = (expense(make, 32)[1] - expense(make, 16)[1]) / 16 / copy
    by_size = (expense(make, 16, size=16)[1] - expense(make, 16, size=8)[1]) / 8 / copy
    return round(by_step, 1) + 0.0, round(by_size, 1) + 0.0


def memory(by_step: float, by_size: float) -> str:
    """In words."""
    parts = [f"{by_step:g} per step"] if by_step else []
    parts += [f"{by_size:g} per hyperparameter"] if by_size else []
    return ", ".join(parts) or "constant"


def mark(holds: bool) -> str:
    """A tick or nothing."""
    return "✓" if holds else ""


def page() -> str:
    """The whole page."""
    rows = []
    for case in ESTIMATORS:
        estimator = case.make(8)
        cost = cost_of(case.make)
        traits = estimator.traits
        (by_step, by_size) = growth(case.make)
        longer = traits.sees not in ("nothing", "the last step")
        marks = [mark(traits.high_dimensional), mark(estimator.online), mark(not by_step), mark(longer)]
        rows.append([case.name, *marks, traits.sees, cost, memory(by_step, by_size), traits.bias])
    header = ["estimator", "large λ", "online", "constant memory", "horizon > 1", "sees", "cost", "memory", "bias"]
    return INTRODUCTION + tabulate(rows, header, tablefmt="github") + "\n" + CLAIMS


if __name__ == "__main__":
    TARGET.write_text(page())
    print(f"wrote {TARGET}")
