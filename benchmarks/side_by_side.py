"""``python -m benchmarks``: time and peak memory of every engine on every problem, side by side, one thread.

Time: an engine's over the hand-written loop's. Memory: growth of the resident set's peak, each
measurement in a process of its own (`benchmarks/measure.py` says how both are taken). Results of
several runs into the same folder are put together.
"""

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import measure
from benchmarks.engines import ENGINES
from benchmarks.problem import few
from benchmarks.problems import PROBLEMS
from benchmarks.report import Row, merged, picture, table

# problem: horizons to time, horizons to weigh, from where on only the engines AT_LENGTH take part
SIZES = {
    "sinusoid": ([10, 100, 1000], [100, 1000], 1000),
    "conv_anil": ([5, 10, 20], [5, 20, 100], 10),
    "conv_warpgrad": ([5, 10, 20], [5, 20, 100], 10),
    "conv_warpgrad_no_norm": ([], [20], 10),
    "transformer": ([10, 100, 1000], [20, 100, 1000], 1000),
}
# at long horizons the slow engines would take many minutes, and their ratios are known from short
# ones
AT_LENGTH = ("naive", "ours: RMD, Full", "ours: RMD, Checkpointed (17 slots)", "ours: DrMAD")

CONTROLS = {
    "RMD, Full, once more",
}  # no engines of their own: timed only where they are asked for


def engines_for(problem: str, T: int) -> list[str]:
    asked = CONTROLS | (
        {"JAX, jit + scan"} if problem.startswith("conv") else set()
    )  # JAX takes five to ten times naive there, on a CPU
    return [name for name in ENGINES if name in AT_LENGTH or (T < SIZES[problem][2] and name not in asked)]


class Chosen(NamedTuple):
    """What the command line asks for.

    Some horizons, engines whose names contain one of some words (naive is always timed, not always
    weighed).
    """

    horizons: list[int] | None = None
    only: list[str] | None = None

    def of(self, horizons: list[int]) -> list[int]:
        return self.horizons or horizons

    def engines(self, problem: str, T: int, *always: str) -> list[str]:
        if self.only is None:
            return engines_for(problem, T)
        return [name for name in ENGINES if name in always or any(word in name for word in self.only)]


def seconds(problem: str, T: int, engines: list[str], rounds: int, naive_steps: int | None) -> measure.Times:
    """Of each engine. ``naive_steps``.

    Naive takes that many only, and its time is scaled to T (its outer gradient counts as a step).
    """
    torch.manual_seed(0)
    made = PROBLEMS[problem].make(T, torch.float32)
    short = T if naive_steps is None else min(T, naive_steps)
    problems = {"naive": made._replace(batches=made.batches[:short])}
    times = measure.seconds({name: partial(ENGINES[name], problems.get(name, made)) for name in engines}, rounds)
    return {**times, "naive": [own * (T + 1) / (short + 1) for own in times["naive"]]}


def growth(problem: str, T: int, engine: str) -> float | None:
    made = PROBLEMS[problem].make(T, torch.float32)
    ENGINES[engine](few(made))  # what is loaded on first use is not counted
    return measure.growth(partial(ENGINES[engine], made))


def measured(
    problems: list[str], rounds: int, time_them: bool, weigh_them: bool, chosen: Chosen, naive_steps: int | None
) -> list[Row]:
    rows = []
    for problem in problems:
        to_time, to_weigh, _ = SIZES[problem]
        for T in chosen.of(to_time) if time_them else ():
            times = seconds(problem, T, chosen.engines(problem, T, "naive"), rounds, naive_steps)
            for name, own in times.items():
                ratio = measure.ratio(times, name, "naive")
                rows.append(
                    {"problem": problem, "T": T, "engine": name, "seconds": statistics.median(own), "ratio": ratio}
                )
                print(
                    f"{problem:14} T={T:<5} {name:34} {ratio:6.2f} x naive   {statistics.median(own):8.3f} s",
                    flush=True,
                )
        for T in chosen.of(to_weigh) if weigh_them else ():
            for name in chosen.engines(problem, T):
                mebibytes = measure.alone(growth, problem, T, name)
                if mebibytes is not None:
                    rows.append({"problem": problem, "T": T, "engine": name, "MiB": mebibytes})
                    print(f"{problem:14} T={T:<5} {name:34} {mebibytes:8.0f} MiB", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--problems", default=",".join(PROBLEMS), help="comma-separated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--horizons", type=int, nargs="+", help="other ones than those of the table")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="engines with one of these words in their names")
    parser.add_argument(
        "--naive-steps",
        type=int,
        metavar="N",
        help="naive takes N steps, its time is scaled: for a T at which it does not fit",
    )
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-time", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chosen = Chosen(arguments.horizons, arguments.only)
    rows = measured(
        arguments.problems.split(","),
        arguments.rounds,
        not arguments.no_time,
        not arguments.no_memory,
        chosen,
        arguments.naive_steps,
    )
    report(merged(rows, arguments.out / "rows.json"), arguments.out)


def report(rows: list[Row], out: Path) -> None:
    parts = []
    engines = list(dict.fromkeys([*ENGINES, *(row["engine"] for row in rows)]))
    for value, title, digits, file in (
        ("ratio", "time / naive", 2, None),
        ("seconds", "seconds", 2, "time.png"),
        ("MiB", "peak memory growth, MiB", 0, "memory.png"),
    ):
        if any(value in row for row in rows):
            parts += [title, "", table(rows, value, digits, engines), ""]
            if file is not None:
                picture(rows, value, title, out / file, engines)
    (out / "table.md").write_text("\n".join(parts) + "\n")
