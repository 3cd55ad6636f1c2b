"""``python -m benchmarks.online``: one online step of each method (a hyper-step at every inner step) against a plain inner step.

The methods take turns; a figure is the median over rounds. Compiled ones are timed against the plain step as it is, eager. Memory: growth of the
resident set's peak, each in a process of its own.
Passes per step (forward, backward, contraction of a gradient's graph; `tests/test_adjoint.py` counts them), the outer loss's forward and backward
aside: plain 1, 1, 0; FirstOrder the same; OneStep 1, 1, 1; HyperDistill 2, 2, 1.
"""

import argparse
import statistics
import subprocess
import sys
import time
from functools import partial

import torch

import metaopt as mo
from benchmarks import memory
from benchmarks.engines.ours import parts
from benchmarks.problems import PROBLEMS

ESTIMATORS = {"FirstOrder": mo.FirstOrder(), "OneStep": mo.OneStep(), "HyperDistill": mo.HyperDistill()}
METHODS = ("plain", *ESTIMATORS)
COMPILED = ("plain, compiled", "HyperDistill, compiled")
STEPS: dict[tuple[int, str], mo.inner.InnerStep] = {}  # what is compiled is kept from call to call


def run(problem, method: str) -> None:
    step, loss, w, lam = parts(problem)
    if method.endswith(", compiled"):
        method = method.removesuffix(", compiled")
        step = STEPS.setdefault((id(problem), method), mo.inner_step(loss, step.optimizer, compile=True))
    if method == "plain":
        state = step.init(w, lam)
        for batch in problem.batches:
            state = step(state, lam, batch)
        return
    outer_batches, optimizer = [problem.outer_batch] * len(problem.batches), partial(torch.optim.SGD, lr=1e-3)
    for _ in mo.online(step, loss, w, lam, problem.batches, outer_batches, ESTIMATORS[method], optimizer):
        pass


def growth(problem: str, T: int, method: str) -> float:
    out = subprocess.run([sys.executable, "-m", "benchmarks.online", "--weigh", problem, str(T), method], capture_output=True, text=True, check=True)
    return float(out.stdout)


def weigh(problem: str, T: int, method: str) -> None:
    made = PROBLEMS[problem].make(T, torch.float32)
    few = tuple(part[:4].clone() for part in made.outer_batch)
    run(made._replace(batches=[few] * 2, outer_batch=few), method)
    print(memory.growth(lambda: run(made, method))[1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.online", description=__doc__)
    parser.add_argument("--problems", default="sinusoid,conv_anil,conv_warpgrad", help="comma-separated")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="compiled ones, too (minutes of compiling)")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--weigh", nargs=3, metavar=("PROBLEM", "T", "METHOD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.weigh:
        return weigh(arguments.weigh[0], int(arguments.weigh[1]), arguments.weigh[2])
    for name in arguments.problems.split(","):
        torch.manual_seed(0)
        problem = PROBLEMS[name].make(arguments.steps, torch.float32)
        methods = METHODS + COMPILED * arguments.compile
        times: dict[str, list[float]] = {method: [] for method in methods}
        for turn in range(arguments.rounds + 1):
            for method in methods:
                start = time.process_time()
                run(problem, method)
                times[method].append(time.process_time() - start) if turn else None
        for method, own in times.items():
            plain, one = (statistics.median(a / b for a, b in zip(own, times[of], strict=True)) for of in ("plain", "OneStep"))
            print(f"{name:14} {method:22} {plain:5.2f} x plain   {one:5.2f} x OneStep", flush=True)
        for method in () if arguments.no_memory else METHODS:
            print(f"{name:14} {method:22} {growth(name, arguments.steps, method):6.0f} MiB", flush=True)
    return None


if __name__ == "__main__":
    main()
