"""``python -m benchmarks.online``.

One online step of each method (a hyper-step at every inner step) against a plain inner step.

The plain step is the hand-written one; *ours* is the same training by an `InnerStep`. The methods
take turns; a figure is the median over rounds. Compiled ones are timed against the eager plain
step, too. Memory: growth of the resident set's peak, each in a process of its own. Passes per step
(forward, backward, contraction of a gradient's graph; `tests/test_adjoint.py` counts them), the
outer loss's forward and backward aside: plain 1, 1, 0; FirstOrder the same; OneStep 1, 1, 1;
HyperDistill 2, 2, 1.
"""

import argparse
from functools import partial

import torch

import metaopt as mo
from benchmarks import measure
from benchmarks.engines import naive
from benchmarks.engines.ours import parts, trained
from benchmarks.problem import Problem, few
from benchmarks.problems import PROBLEMS

ESTIMATORS = {"FirstOrder": mo.FirstOrder(), "OneStep": mo.OneStep(), "HyperDistill": mo.HyperDistill()}
METHODS = ("plain", "plain, ours", *ESTIMATORS)
COMPILED = ("plain, ours, compiled", "HyperDistill, compiled")
PARTS: dict[
    tuple[int, str], tuple[mo.inner.InnerStep, mo.CompiledLoss]
] = {}  # what is compiled is kept from call to call


def run(problem: Problem, method: str) -> object:
    if method == "plain":
        return naive.plain(problem)
    step, loss, w, lam = parts(problem)
    if method.endswith(", compiled"):
        method = method.removesuffix(", compiled")
        step, loss = PARTS.setdefault(
            (id(problem), method), (mo.compiled(mo.inner_step(loss, step.optimizer)), mo.compiled(loss))
        )
    if method == "plain, ours":
        return trained(step, w, lam, problem.batches)
    outer_batches = [problem.outer_batch] * len(problem.batches)
    optimizer = partial(torch.optim.SGD, lr=1e-3)
    *_, last = mo.online(
        step, loss, w, lam, problem.batches, outer_batches, estimator=ESTIMATORS[method], optimizer=optimizer
    )
    return last.lam


def growth(problem: str, T: int, method: str) -> float | None:
    made = PROBLEMS[problem].make(T, torch.float32)
    run(few(made), method)
    return measure.growth(partial(run, made, method))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.online", description=__doc__)
    parser.add_argument("--problems", default="sinusoid,conv_anil,conv_warpgrad", help="comma-separated")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="compiled ones, too (minutes of compiling)")
    parser.add_argument("--no-memory", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.problems.split(","):
        torch.manual_seed(0)
        problem = PROBLEMS[name].make(arguments.steps, torch.float32)
        methods = METHODS + COMPILED * arguments.compile
        times = measure.seconds({method: partial(run, problem, method) for method in methods}, arguments.rounds)
        for method in methods:
            plain = measure.ratio(times, method, "plain")
            one = measure.ratio(times, method, "OneStep")
            print(f"{name:14} {method:22} {plain:5.2f} x plain   {one:5.2f} x OneStep", flush=True)
        for method in () if arguments.no_memory else METHODS:
            print(f"{name:14} {method:22} {measure.alone(growth, name, arguments.steps, method):6.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
