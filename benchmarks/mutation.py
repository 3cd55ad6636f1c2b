"""Does ``metaopt verify`` notice a fault? Faults are planted one at a time in a copy of the package.

``python -m benchmarks.mutation [--workers N] [--only TEXT]`` copies the package to a temporary folder, changes one
expression there, runs ``metaopt verify`` on it until the first failure, and prints which faults were noticed. The
working tree is not touched. A fault whose text is not found any more is an error: it has to be written anew.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import metaopt

PACKAGE = Path(metaopt.__file__).parent
LIMIT = 600
"""Seconds that one verification may take."""


class Fault(NamedTuple):
    """``old`` becomes ``new`` once, in the first place where it stands."""

    name: str
    file: str
    old: str
    new: str


FAULTS = (
    # -- optimisers ------------------------------------------------------------------------------
    Fault("SGD's transpose without weight decay", "optim/sgd.py", 'w_bar + hyper["weight_decay"] * g_bar', "w_bar"),
    Fault("SGD's transpose: velocity not decayed", "optim/sgd.py", '{"momentum": mu * v_bar}', '{"momentum": v_bar}'),
    Fault("SGD's transpose: dampening ignored", "optim/sgd.py", '(1.0 - hyper["dampening"]) * v_bar', "v_bar"),
    Fault(
        "SGD's direction detached",
        "optim/sgd.py",
        'return _minus(w, hyper["lr"], direction)',
        'return _minus(w, hyper["lr"], direction.detach())',
    ),
    Fault("Adam: second moment detached", "optim/adam.py", "safe.sqrt(second) /", "safe.sqrt(second.detach()) /"),
    Fault(
        "Adam: bias correction one step late", "optim/adam.py", "(1 - beta2**t) ** 0.5", "(1 - beta2 ** (t + 1)) ** 0.5"
    ),
    Fault(
        "Adam: learning rate detached",
        "optim/adam.py",
        'hyper["lr"] / (1 - beta1**t)',
        'getattr(hyper["lr"], "detach", lambda: hyper["lr"])() / (1 - beta1**t)',
    ),
    Fault("moments: the square's factor", "optim/moments.py", "(1 - beta2) * g * g", "(1 - beta2) * g * g.detach()"),
    Fault("decoupled decay without the rate", "optim/moments.py", 'w * (1 - hyper["lr"] * decay)', "w * (1 - decay)"),
    Fault(
        "RMSprop: centre not squared", "optim/rmsprop.py", "variance - mean * mean", "variance - mean * mean.detach()"
    ),
    Fault(
        "EMA: average detached",
        "optim/average.py",
        "decay * a + (1 - decay) * x",
        "decay * a.detach() + (1 - decay) * x",
    ),
    Fault(
        "ClipNorm: factor held constant", "optim/clip.py", "factor.to(x.dtype) * x", "factor.detach().to(x.dtype) * x"
    ),
    Fault(
        "Accumulate: mean of one step more",
        "optim/accumulate.py",
        "x / self.every if count",
        "x / (self.every + 1) if count",
    ),
    Fault("a wrapper's inner step number", "optim/accumulate.py", "lam, t // self.every)", "lam, t)"),
    # -- the inner step --------------------------------------------------------------------------
    Fault(
        "pullback of the step before",
        "inner/_update.py",
        "w_new, slots_new = optimizer.update(g_, w, slots, lam, state.t + 1)",
        "w_new, slots_new = optimizer.update(g_, w, slots, lam, state.t + 2)",
    ),
    Fault(
        "optimiser's own part of λ dropped",
        "inner/_linearized.py",
        "mixed if lam_bar is None else tree.add(mixed, lam_bar)",
        "mixed",
    ),
    Fault(
        "Hessian's part dropped",
        "inner/_linearized.py",
        "_sum(a, b, x) for a, b, x in parts",
        "_sum(a, None, x) for a, b, x in parts",
    ),
    Fault(
        "slots' cotangent dropped",
        "inner/_linearized.py",
        "for a, b, x in parts]), slots_bar, self._at.t)",
        "for a, b, x in parts]), None, self._at.t)",
    ),
    Fault(
        "mixed mode along the wrong tangent",
        "inner/_dual.py",
        "map(forward_ad.make_dual, w_leaves, u)",
        "map(forward_ad.make_dual, w_leaves, [x * 1.001 for x in u])",
    ),
    Fault(
        "reverse over reverse: λ's part doubled",
        "inner/reverse_over_reverse.py",
        "return list(products[: len(w)]), list(products[len(w) :])",
        "return list(products[: len(w)]), [x if x is None else 2 * x for x in products[len(w) :]]",
    ),
    Fault("chunk: products not summed", "inner/chunk.py", "total = tree.add(total, product)", "total = product"),
    Fault(
        "chunk: steps in ascending order",
        "inner/chunk.py",
        "range(len(self._parts) - 1, -1, -1)",
        "range(len(self._parts))",
    ),
    Fault(
        "custom step: slots' cotangent ignored",
        "inner/custom.py",
        "seeds = tree.floats(InnerState(cotangent.w, slots))",
        "seeds = tree.floats(InnerState(cotangent.w, tree.zeros_like(slots)))",
    ),
    Fault(
        "forward mode: first weights' tangent",
        "inner/_tangents.py",
        "dots = tree.leaves(state_dots.w) + dots_of(lam_dots, self._lam)",
        "dots = tree.leaves(tree.scale(0.999, state_dots.w)) + dots_of(lam_dots, self._lam)",
    ),
    # -- trajectories ----------------------------------------------------------------------------
    Fault(
        "a replay restores no random state",
        "trajectory/base.py",
        "        replay.restore(self.rng)\n",
        "        pass\n",
    ),
    Fault(
        "Checkpointed: a state one step early",
        "trajectory/checkpointed.py",
        "for index in range(at, to):",
        "for index in range(at, max(at + 1, to - 1)):",
    ),
    Fault(
        "Checkpointed: random state of the run's end",
        "trajectory/checkpointed.py",
        "replay.restore(rng)\n            state = step",
        "state = step",
    ),
    Fault(
        "Offloaded in float32",
        "trajectory/store.py",
        "x.to(self.device, copy=True) if",
        "x.to(self.device, copy=True).float().to(x.dtype) if",
    ),
    Fault(
        "stored on disk in float32",
        "trajectory/store.py",
        "there.copy_(tensor.detach())",
        "there.copy_(tensor.detach().float())",
    ),
    Fault("Last: one state too few", "trajectory/last.py", "[-self.steps :]", "[-max(1, self.steps - 1) :]"),
    Fault("straight line shifted by a step", "trajectory/interpolated.py", "t / horizon)", "(t + 1) / horizon)"),
    Fault("rows overwritten", "trajectory/_rows.py", "return self._block[self._free]", "return self._block[0]"),
    Fault(
        "one place for cotangents instead of two",
        "trajectory/_rows.py",
        "self._now, self._before = self._before, self._now\n",
        "pass\n",
    ),
    Fault(
        "Budgeted: a step swept twice",
        "trajectory/budgeted.py",
        "tape.states.steps - len(tape.graphs))",
        "min(tape.states.steps, tape.states.steps - len(tape.graphs) + 1))",
    ),
    Fault(
        "Reversible: velocity not undone",
        "trajectory/reversible.py",
        "bits.divide(u - g, *beta)",
        "bits.divide(u, *beta)",
    ),
    Fault(
        "distillate: newest weighted as one step less",
        "trajectory/distilled.py",
        "(gamma - gamma**t) / (1.0 - gamma**t)",
        "(gamma - gamma ** (t - 1)) / (1.0 - gamma**t)",
    ),
    # -- estimators ------------------------------------------------------------------------------
    Fault(
        "initial × .999",
        "estimators/reverse.py",
        "cotangent if complete else None)",
        "cotangent._replace(w=tree.scale(0.999, cotangent.w)) if complete else None)",
    ),
    Fault(
        "sweep: last product left out",
        "estimators/reverse.py",
        '        yield newer, "lam"\n',
        '        yield newer, "state"\n',
    ),
    Fault(
        "cotangents along the way ignored",
        "estimators/reverse.py",
        "cotangent = _sum(cotangent, waiting.pop(moment.state.t))",
        "waiting.pop(moment.state.t)",
    ),
    Fault(
        "forward mode: Z times α of the slots",
        "estimators/forward.py",
        "_times(alpha, carry.Z.w)",
        "_times(tree.scale(0.999, alpha), carry.Z.w)",
    ),
    Fault(
        "implicit: the sign of A",
        "estimators/implicit.py",
        "return tree.sub(v, product)",
        "return tree.add(v, product)",
    ),
    Fault(
        "implicit: a term too many",
        "linsolve/neumann.py",
        "for _ in range(self.terms):",
        "for _ in range(self.terms + 1):",
    ),
    Fault(
        "HyperDistill: size of a step more",
        "estimators/hyperdistill.py",
        "return self.theta * geometric_sum(self.gamma, t)",
        "return self.theta * geometric_sum(self.gamma, t + 1)",
    ),
    Fault(
        "EvoGrad: temperature squared",
        "estimators/evograd.py",
        "torch.softmax(-losses / self.temperature, 0)",
        "torch.softmax(-losses / self.temperature**2, 0)",
    ),
    Fault(
        "DARTS and SAMA: half the difference",
        "estimators/_mixed_difference.py",
        "(a - b) / (2 * epsilon)",
        "(a - b) / epsilon",
    ),
    Fault(
        "SOBA: the rate twice",
        "estimators/soba.py",
        "tree.scale(-1.0 / self.rate, product)",
        "tree.scale(-1.0, product)",
    ),
    Fault("F2SA: the multiplier left out", "estimators/f2sa.py", "self.multiplier * (a - b)", "(a - b)"),
    Fault("BOME: the barrier's sign", "estimators/bome.py", "self.eta - along / squared", "self.eta + along / squared"),
    Fault(
        "FDS: the mean over another window",
        "estimators/fds.py",
        "x / size, gradient, window)",
        "x / (size + 1), gradient, window)",
    ),
    Fault(
        "evolution: one side twice",
        "estimators/evolution.py",
        "minus = step(pair.minus, self._moved(lam, pair, -1), batch)",
        "minus = step(pair.plus, self._moved(lam, pair, -1), batch)",
    ),
    Fault("PES: noise of the last window alone", "estimators/evolution.py", "xi=tree.add(pair.xi, noise)", "xi=noise"),
    Fault("UORO: no balance", "estimators/uoro.py", "tree.scale(1 / old, theta)", "theta"),
    Fault(
        "direct term dropped",
        "estimators/base.py",
        "return Terms(loss, direct, response.lam",
        "return Terms(loss, tree.map(lambda _: None, direct), response.lam",
    ),
    # -- solvers and schedules -------------------------------------------------------------------
    Fault(
        "conjugate gradients: old direction",
        "linsolve/conjugate_gradient.py",
        "tree.scale(squared / previous, p)",
        "tree.scale(previous / previous, p)",
    ),
    Fault("schedule: a window late", "optim/schedules.py", "(t - 1) // horizon", "t // horizon"),
)


def notices(fault: Fault) -> tuple[bool, float, str]:
    """Whether verification fails with the fault, how long that took, and what it said.

    Raises:
        LookupError: if the text that the fault changes is not there.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "metaopt"
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        file = copy / fault.file
        text = file.read_text()
        if fault.old not in text:
            raise LookupError(f"{fault.name}: {fault.old!r} is not in {fault.file} any more; write the fault anew")
        file.write_text(text.replace(fault.old, fault.new, 1))
        command = "import sys; from metaopt.verify.command import run; sys.exit(0 if run(first=True) else 1)"
        environment = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", command],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
        failed = [line for line in done.stdout.splitlines() if " failed on " in line]
        last = done.stderr.strip().splitlines()[-1:] if done.returncode else []
        said = (failed or last or [""])[0]
        return done.returncode != 0, time.perf_counter() - start, said


def main() -> None:
    """Plant the faults, and say which were noticed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="verifications at a time")
    parser.add_argument("--only", default="", help="faults with this text in their name or file")
    asked = parser.parse_args()
    faults = [fault for fault in FAULTS if asked.only in fault.name or asked.only in fault.file]
    table = Table("fault", "file", "noticed", "s", "by")
    with ThreadPoolExecutor(asked.workers) as pool:
        found = list(tqdm(pool.map(notices, faults), total=len(faults), unit="fault"))
    for fault, (noticed, seconds, said) in zip(faults, found, strict=True):
        table.add_row(fault.name, fault.file, "yes" if noticed else "NO", f"{seconds:.0f}", said[:70])
    Console(width=160).print(table)
    print(f"{sum(noticed for noticed, *_ in found)} of {len(faults)} faults noticed")


if __name__ == "__main__":
    main()
