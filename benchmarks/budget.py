"""``python -m benchmarks.budget``: time against bytes, for `Budgeted` on the conv nets.

From states only to every graph.

The naive loop and the budgets take turns; a figure is the median over rounds of time / naive's time
in the same round.
"""

import argparse
from functools import partial
from pathlib import Path

import torch

import metaopt as mo
from benchmarks import measure
from benchmarks.engines import naive, ours
from benchmarks.problems import PROBLEMS
from benchmarks.report import merged, pyplot

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def sizes(problem) -> tuple[int, int]:
    """Bytes of all states and of the graphs of all steps, as `Budgeted` counts them."""
    trajectory = mo.trajectory.Budgeted(1 << 40)
    step, _, w, lam = ours.parts(problem)
    state = step.init(w, lam)
    tape = trajectory.start(state, lam)
    trajectory.record(tape, step, state, lam, problem.batches[0])
    T = len(problem.batches)
    return (T + 1) * tape.state_size, T * tape.graphs[0].size


def measured(name: str, T: int, rounds: int) -> list[dict]:
    torch.manual_seed(0)
    problem = PROBLEMS[name].make(T, torch.float32)
    states, graphs = sizes(problem)
    engines = {"naive": partial(naive.gradient, problem), "states only": partial(ours.gradient, problem, mo.RMD())}
    for share in SHARES[1:]:
        trajectory = mo.trajectory.Budgeted(states + int(share * graphs))
        engines[f"{share:.0%} of the graphs"] = partial(ours.gradient, problem, mo.RMD(trajectory))
    times = measure.seconds(engines, rounds)
    rows = []
    for number, engine in enumerate(engines):
        ratio = measure.ratio(times, engine, "naive")
        share = None if number == 0 else SHARES[number - 1]
        rows.append(
            {
                "problem": name,
                "T": T,
                "engine": engine,
                "share": share,
                "budget MiB": (states + (share or 0) * graphs) / 2**20,
                "ratio": ratio,
            }
        )
        print(f"{name:14} T={T:<3} {engine:24} {ratio:5.2f} x naive", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.budget", description=__doc__)
    parser.add_argument("--problem", default="conv_anil", choices=["conv_anil", "conv_warpgrad"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = merged(measured(arguments.problem, arguments.steps, arguments.rounds), arguments.out / "budget.json")
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(5, 3.5))
    for problem, T in dict.fromkeys((row["problem"], row["T"]) for row in rows):
        points = [
            (row["budget MiB"], row["ratio"])
            for row in rows
            if (row["problem"], row["T"]) == (problem, T) and row["share"] is not None
        ]
        axis.plot(*zip(*sorted(points), strict=True), "o-", label=f"{problem}, T={T}")
    axis.axhline(1.0, color="grey", linestyle="--", label="naive")
    axis.set(xlabel="budget, MiB", ylabel="time / naive")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(arguments.out / "budget.png", dpi=100)


if __name__ == "__main__":
    main()
