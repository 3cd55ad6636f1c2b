"""``python -m benchmarks.tasks``: exact RMD on a meta-batch of four tasks, one thread.

Four ways: a loop over the tasks (four hypergradients, added), one stacked problem
(`mo.vmapped`), one problem that loops inside its losses (`mo.looped`), and that one a
task at a time (`mo.meta.in_task_chunks`). They take turns; a figure is the median over rounds of
(its time / the loop's in the same round). Memory: growth of the resident set's peak, each in a
process of its own.
"""

import argparse
import statistics
from functools import partial

import torch

import metaopt as mo
from benchmarks import measure
from benchmarks.engines.ours import parts
from benchmarks.problem import Problem, few
from benchmarks.problems import PROBLEMS
from metaopt import tree

TASKS = 4
WAYS = ("loop over tasks", "stacked", "looped", "looped, a task at a time")
SIZES = {"sinusoid": 30, "conv_anil": 5, "conv_warpgrad": 3}  # T


def run(problem: Problem, way: str):
    """Every task has the problem's batches in its own order."""
    step, loss, w, lam = parts(problem)
    data = [*problem.batches, problem.outer_batch]
    data = [data[i:] + data[:i] for i in range(TASKS)]
    if way == "loop over tasks":
        found = [mo.hypergradient(step, loss, w, lam, own[:-1], own[-1], estimator=mo.RMD()).total for own in data]
        return {name: sum(one[name] for one in found) for name in lam}
    wrap = mo.vmapped if way == "stacked" else mo.looped
    pair = (mo.inner_step(wrap(loss), step.optimizer), wrap(loss))
    if way == "looped, a task at a time":
        pair = mo.meta.in_task_chunks(*pair, 1)
    batches = [tree.stack(together) for together in zip(*data, strict=True)]
    return mo.hypergradient(*pair, mo.replicated(w, TASKS), lam, batches[:-1], batches[-1], estimator=mo.RMD()).total


def growth(problem: str, T: int, way: str) -> float | None:
    made = PROBLEMS[problem].make(T, torch.float32)
    run(few(made), way)
    return measure.growth(partial(run, made, way))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tasks", description=__doc__)
    parser.add_argument("--problems", default=",".join(SIZES), help="comma-separated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-memory", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.problems.split(","):
        torch.manual_seed(0)
        T = SIZES[name]
        problem = PROBLEMS[name].make(T, torch.float32)
        times = measure.seconds({way: partial(run, problem, way) for way in WAYS}, arguments.rounds)
        for way, own in times.items():
            ratio = measure.ratio(times, way, "loop over tasks")
            print(f"{name:14} T={T:<3} {way:25} {ratio:5.2f} x loop   {statistics.median(own):8.3f} s", flush=True)
        for way in () if arguments.no_memory else WAYS:
            print(f"{name:14} T={T:<3} {way:25} {measure.alone(growth, name, T, way):6.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
