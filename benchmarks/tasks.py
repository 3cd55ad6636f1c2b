"""``python -m benchmarks.tasks``: exact RMD on a meta-batch of four tasks, one thread.

Four ways: a loop over the tasks (four hypergradients, added), one stacked problem (`mo.meta.stacked`), one problem that loops inside its losses
(`mo.meta.looped`), and that one a task at a time (`mo.meta.in_task_chunks`). They take turns; a figure is the median over rounds of (its time / the
loop's in the same round). Memory: growth of the resident set's peak, each in a process of its own.
"""

import argparse
import statistics
import subprocess
import sys
import time

import torch

import metaopt as mo
from benchmarks import memory
from benchmarks.engines.ours import parts
from benchmarks.problem import Problem
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
        found = [mo.hypergradient(step, loss, w, lam, own[:-1], own[-1], mo.RMD()).total for own in data]
        return {name: sum(one[name] for one in found) for name in lam}
    wrap = mo.meta.stacked if way == "stacked" else mo.meta.looped
    pair = (mo.inner_step(wrap(loss), step.optimizer), wrap(loss))
    if way == "looped, a task at a time":
        pair = mo.meta.in_task_chunks(*pair, 1)
    batches = [tree.stack(together) for together in zip(*data, strict=True)]
    return mo.hypergradient(*pair, mo.meta.replicated(w, TASKS), lam, batches[:-1], batches[-1], mo.RMD()).total


def growth(problem: str, T: int, way: str) -> float:
    command = [sys.executable, "-m", "benchmarks.tasks", "--weigh", problem, str(T), way]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def weigh(problem: str, T: int, way: str) -> None:
    made = PROBLEMS[problem].make(T, torch.float32)
    few = tuple(part[:2].clone() for part in made.outer_batch)
    run(made._replace(batches=[few] * 2, outer_batch=few), way)
    print(memory.growth(lambda: run(made, way))[1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tasks", description=__doc__)
    parser.add_argument("--problems", default=",".join(SIZES), help="comma-separated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--weigh", nargs=3, metavar=("PROBLEM", "T", "WAY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.weigh:
        return weigh(arguments.weigh[0], int(arguments.weigh[1]), arguments.weigh[2])
    for name in arguments.problems.split(","):
        torch.manual_seed(0)
        T = SIZES[name]
        problem = PROBLEMS[name].make(T, torch.float32)
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        for turn in range(arguments.rounds + 1):
            for way in WAYS:
                start = time.process_time()
                run(problem, way)
                times[way].append(time.process_time() - start) if turn else None
        for way, own in times.items():
            ratio = statistics.median(a / b for a, b in zip(own, times["loop over tasks"], strict=True))
            print(f"{name:14} T={T:<3} {way:25} {ratio:5.2f} x loop   {statistics.median(own):8.3f} s", flush=True)
        for way in () if arguments.no_memory else WAYS:
            print(f"{name:14} T={T:<3} {way:25} {growth(name, T, way):6.0f} MiB", flush=True)
    return None


if __name__ == "__main__":
    main()
