"""``python -m benchmarks``: time and peak memory of every engine on every problem, side by side, one thread.

Time: processor seconds of one thread, so that waiting for other jobs does not count; engines take turns (A B C A B C …), and a figure is
the median over rounds of time / naive's time in the same round. Memory: growth of the resident set's peak over what was resident before,
each measurement in a process of its own. Results of several runs into the same folder are put together.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import memory
from benchmarks.engines import ENGINES
from benchmarks.problems import PROBLEMS
from benchmarks.report import Row, merged, picture, table

# problem: horizons to time, horizons to weigh
SIZES = {
    "sinusoid": ([10, 100, 1000], [100, 1000]),
    "conv_anil": ([5, 10, 20], [5, 20, 100]),
    "conv_warpgrad": ([5, 10, 20], [5, 20, 100]),
    "transformer": ([10, 100, 1000], [20, 100, 1000]),
}
# at long horizons the slow engines would take many minutes, and their ratios are known from short ones
AT_LENGTH = ("naive", "ours: RMD, Full", "ours: RMD, Checkpointed (17 slots)", "ours: DrMAD")


def engines_for(problem: str, T: int) -> list[str]:
    long = {"sinusoid": 1000, "conv_anil": 10, "conv_warpgrad": 10, "transformer": 1000}[problem]
    slow = {"JAX, jit + scan"} if problem.startswith("conv") else set()  # five to ten times naive on a CPU: when asked for
    return [name for name in ENGINES if name in AT_LENGTH or (T < long and name not in slow)]


class Chosen(NamedTuple):
    """What the command line asks for: some horizons, engines whose names contain one of some words (naive always takes part)."""

    horizons: list[int] | None = None
    only: list[str] | None = None

    def of(self, horizons: list[int]) -> list[int]:
        return self.horizons or horizons

    def engines(self, problem: str, T: int) -> list[str]:
        if self.only is None:
            return engines_for(problem, T)
        return [name for name in ENGINES if name == "naive" or any(word in name for word in self.only)]


def seconds(problem: str, T: int, engines: list[str], rounds: int) -> dict[str, list[float]]:
    torch.manual_seed(0)
    made = PROBLEMS[problem].make(T, torch.float32)
    times: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(rounds + 1):
        for name in engines:
            start = time.process_time()
            if ENGINES[name](made) is not None and turn > 0:
                times[name].append(time.process_time() - start)
    return times


def growth(problem: str, T: int, engine: str) -> float | None:
    """Peak memory growth in MiB, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks", "--weigh", problem, str(T), engine]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    return float(out.stdout.split()[-1]) if out.returncode == 0 else None


def weigh(problem: str, T: int, engine: str) -> None:
    made = PROBLEMS[problem].make(T, torch.float32)
    few = tuple(part[:2].clone() for part in made.outer_batch)
    ENGINES[engine](made._replace(batches=[few] * 2, outer_batch=few))  # what is loaded on first use is not counted
    result, mebibytes = memory.growth(lambda: ENGINES[engine](made))
    if result is None:
        raise SystemExit(1)
    print(mebibytes)


def measure(problems: list[str], rounds: int, time_them: bool, weigh_them: bool, chosen: Chosen) -> list[Row]:
    rows = []
    for problem in problems:
        to_time, to_weigh = SIZES[problem]
        for T in chosen.of(to_time) if time_them else ():
            names = chosen.engines(problem, T)
            times = seconds(problem, T, names, rounds)
            for name, own in times.items():
                if own:
                    ratio = statistics.median(a / b for a, b in zip(own, times["naive"], strict=True))
                    rows.append({"problem": problem, "T": T, "engine": name, "seconds": statistics.median(own), "ratio": ratio})
                    print(f"{problem:14} T={T:<5} {name:34} {ratio:6.2f} x naive   {statistics.median(own):8.3f} s", flush=True)
        for T in chosen.of(to_weigh) if weigh_them else ():
            for name in chosen.engines(problem, T):
                mebibytes = growth(problem, T, name)
                if mebibytes is not None:
                    rows.append({"problem": problem, "T": T, "engine": name, "MiB": mebibytes})
                    print(f"{problem:14} T={T:<5} {name:34} {mebibytes:8.0f} MiB", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--problems", default=",".join(PROBLEMS), help="comma-separated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--horizons", type=int, nargs="+", help="other ones than those of the table")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="engines with one of these words in their names, and naive")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-time", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--weigh", nargs=3, metavar=("PROBLEM", "T", "ENGINE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.weigh:
        return weigh(arguments.weigh[0], int(arguments.weigh[1]), arguments.weigh[2])
    chosen = Chosen(arguments.horizons, arguments.only)
    rows = measure(arguments.problems.split(","), arguments.rounds, not arguments.no_time, not arguments.no_memory, chosen)
    report(merged(rows, arguments.out / "rows.json"), arguments.out)
    return None


def report(rows: list[Row], out: Path) -> None:
    parts, engines = [], list(dict.fromkeys([*ENGINES, *(row["engine"] for row in rows)]))
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


if __name__ == "__main__":
    main()
