"""Writes ``docs/optimizers.md``.

What holds for each inner optimiser, found out by trying it on the rows of ``metaopt/verify/tables.py``.

python docs/optimizers.py
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from tabulate import tabulate

import metaopt as mo
from metaopt import tree
from metaopt.verify.tables import OPTIMIZERS, OptimizerCase

ROOT = Path(__file__).resolve().parent.parent

TARGET = ROOT / "docs" / "optimizers.md"

INTRODUCTION = """# Inner optimisers

Written by `python docs/optimizers.py`, which tries every row; a test runs it again and compares.

- **torch**: the largest difference to the `torch.optim` counterpart over 20 random steps in float64.
- **differentiable in**: the hyperparameters; each may be a float, a tensor, a pytree like the weights, or a callable `(lam, t)`, and all of
  them are checked against tangents and finite differences by `tests/test_optimizers.py`.
- **vjp = jvp'**: the pullback is the transpose of the tangent map (dot-product test to 1e-8).
- **stacked tasks**: whether a stacked meta-batch works as it is, or needs `mo.optim.PerTask` because the update looks at whole tensors.
- **compiled**: whether `torch.compile(update, fullgraph=True)` traces it to the same numbers.

Derivatives at a zero gradient with nothing accumulated are finite for all of them: the square root of a second moment has derivative 0 at 0
(`metaopt/inner/safe.py`); `torch.optim`'s own `differentiable=True` gives NaN there. Rprop and Lion use signs, which are constant almost
everywhere: hyperparameters inside the inner loss have no response through them. L-BFGS is out of scope: it calls the loss a varying number of
times per step, so it is not a map `(state, batch) -> state`; write it as a `mo.custom_step` if you need its derivative.

"""


def difference_to_torch(case: OptimizerCase) -> str:
    if case.torch is None:
        return "–"
    torch.manual_seed(0)
    w = {"a": torch.randn(3, 2), "b": torch.randn(4)}
    params = [x.clone().requires_grad_() for x in w.values()]
    theirs = case.torch(params)
    ours = case.make()
    slots = ours.init(w)
    for t in range(1, 21):
        g = tree.map(torch.randn_like, w)
        w, slots = ours.update(g, w, slots, None, t)
        for p, x in zip(params, g.values(), strict=True):
            p.grad = x.clone()
        theirs.step()
    largest = max(float((p - x).detach().abs().max()) for p, x in zip(params, w.values(), strict=True))
    return "≤ 1e-12" if largest <= 1e-12 else f"{largest:.0e}"


def transposed(case: OptimizerCase) -> str:
    torch.manual_seed(0)
    w0 = {"a": torch.randn(3, 2), "b": torch.randn(4)}
    batch = {"a": torch.randn(3, 2), "b": torch.randn(4)}
    step = mo.inner_step(lambda w, lam, b: sum(((lam * w[k] - b[k]).tanh() ** 2).sum() for k in w), case.make())
    lam = torch.tensor(0.7)
    state = step(step.init(w0, lam), lam, batch)
    dot, bar = (tree.map(lambda x: torch.randn_like(x) if tree.is_float(x) else x, state) for _ in range(2))
    forward = step.jvp(state, lam, batch, dot, torch.tensor(0.3))
    lam_dot = torch.tensor(0.3)
    state_bar, lam_bar = step.vjp(state, lam, batch, bar)
    left = tree.dot((forward.w, forward.slots), (bar.w, bar.slots))
    right = tree.dot((dot.w, dot.slots), (state_bar.w, state_bar.slots)) + tree.dot(lam_dot, tree.filled(lam_bar, lam))
    return "yes" if abs(float(left - right)) <= 1e-8 * max(1.0, abs(float(left))) else "NO"


def compiles(case: OptimizerCase) -> str:
    torch.manual_seed(0)
    w, g = ({"a": torch.randn(3, 2), "b": torch.randn(4)} for _ in range(2))
    ours = case.make()
    w, slots = ours.update(g, w, ours.init(w), None, 1)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about tracing through the standard library
        try:
            traced = torch.compile(lambda g, w, s: ours.update(g, w, s, None, 2), backend="aot_eager", fullgraph=True)(
                g, w, slots
            )
        except torch._dynamo.exc.Unsupported:
            return "no"
    plain = ours.update(g, w, slots, None, 2)
    return (
        "yes"
        if all(torch.allclose(x, y, atol=1e-12) for x, y in zip(tree.floats(traced), tree.floats(plain), strict=True))
        else "NO"
    )


def page() -> str:
    """The whole page."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        rows = []
        for case in OPTIMIZERS:
            ours = case.make()
            hypers = ", ".join(f"`{name}`" for name in ours.hypers) or "those of what it wraps"
            stacked = "yes" if ours.elementwise else "with `PerTask`"
            rows.append([case.name, difference_to_torch(case), hypers, transposed(case), stacked, compiles(case)])
    finally:
        torch.set_default_dtype(before)
    header = ["optimiser", "torch", "differentiable in", "vjp = jvp'", "stacked tasks", "compiled"]
    return INTRODUCTION + tabulate(rows, header, tablefmt="github") + "\n"


if __name__ == "__main__":
    TARGET.write_text(page())
    print(f"wrote {TARGET}")
