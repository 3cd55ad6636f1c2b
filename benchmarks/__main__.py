"""``python -m benchmarks``: time and peak memory of every engine on every problem, side by side, one thread.

Time: engines take turns (A B C A B C …); a figure is the median over rounds of time / naive's time in the same round. Memory: growth of the
resident set's peak over what the process held before, each measurement in a process of its own.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.engines import ENGINES
from benchmarks.problems import PROBLEMS

# problem: horizons to time, horizons to weigh
SIZES = {
    "sinusoid": ([10, 100], [100, 1000]),
    "conv_anil": ([10], [20, 100]),
    "conv_warpgrad": ([5, 20], [20, 100]),
    "transformer": ([20], [20, 100]),
}
# at long horizons the slow engines would take many minutes, and their ratios are known from short ones
AT_LENGTH = ("naive", "ours: RMD, Full", "ours: RMD, Checkpointed (17 slots)", "ours: RMD, Budgeted (512 MiB)", "ours: DrMAD")


def engines_for(problem: str, T: int) -> list[str]:
    long = {"sinusoid": 1000, "conv_anil": 100, "conv_warpgrad": 20, "transformer": 100}[problem]
    return [name for name in ENGINES if T < long or name in AT_LENGTH]


def seconds(problem: str, T: int, engines: list[str], rounds: int) -> dict[str, list[float]]:
    torch.manual_seed(0)
    made = PROBLEMS[problem].make(T, torch.float32)
    times: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(rounds + 1):
        for name in engines:
            start = time.perf_counter()
            if ENGINES[name](made) is not None and turn > 0:
                times[name].append(time.perf_counter() - start)
    return times


def growth(problem: str, T: int, engine: str) -> float | None:
    """Peak memory growth in MiB, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks", "--weigh", problem, str(T), engine]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    return float(out.stdout) if out.returncode == 0 else None


def weigh(problem: str, T: int, engine: str) -> None:
    ENGINES[engine](PROBLEMS["sinusoid"].make(2, torch.float32))  # what is imported on first use is not counted
    made = PROBLEMS[problem].make(T, torch.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if ENGINES[engine](made) is None:
        raise SystemExit(1)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def measure(problems: list[str], rounds: int, time_them: bool, memory: bool) -> list[dict]:
    rows = []
    for problem in problems:
        to_time, to_weigh = SIZES[problem]
        for T in to_time if time_them else ():
            names = engines_for(problem, T)
            times = seconds(problem, T, names, rounds)
            for name, own in times.items():
                if own:
                    ratio = statistics.median(a / b for a, b in zip(own, times["naive"], strict=True))
                    rows.append({"problem": problem, "T": T, "engine": name, "seconds": statistics.median(own), "ratio": ratio})
                    print(f"{problem:14} T={T:<5} {name:34} {ratio:6.2f} x naive   {statistics.median(own):8.3f} s", flush=True)
        for T in to_weigh if memory else ():
            for name in engines_for(problem, T):
                mebibytes = growth(problem, T, name)
                if mebibytes is not None:
                    rows.append({"problem": problem, "T": T, "engine": name, "MiB": mebibytes})
                    print(f"{problem:14} T={T:<5} {name:34} {mebibytes:8.0f} MiB", flush=True)
    return rows


def table(rows: list[dict], value: str, digits: int) -> str:
    rows = [row for row in rows if value in row]
    columns = list(dict.fromkeys((row["problem"], row["T"]) for row in rows))
    cells = {(row["engine"], row["problem"], row["T"]): f"{row[value]:.{digits}f}" for row in rows}
    lines = ["| | " + " | ".join(f"{problem}, T={T}" for problem, T in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for engine in dict.fromkeys(row["engine"] for row in rows):
        lines.append(f"| {engine} | " + " | ".join(cells.get((engine, *column), "–") for column in columns) + " |")
    return "\n".join(lines)


def picture(rows: list[dict], value: str, label: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if value in row]
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    figure, axes = plt.subplots(1, len(problems), figsize=(4.5 * len(problems), 4), squeeze=False)
    for axis, problem in zip(axes[0], problems, strict=True):
        for engine in dict.fromkeys(row["engine"] for row in rows):
            points = [(row["T"], row[value]) for row in rows if row["engine"] == engine and row["problem"] == problem]
            if points:
                axis.plot(*zip(*points, strict=True), "o-", label=engine)
        axis.set(title=problem, xlabel="T", ylabel=label, xscale="log", yscale="log")
    axes[0][-1].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--problems", default=",".join(PROBLEMS), help="comma-separated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-time", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--weigh", nargs=3, metavar=("PROBLEM", "T", "ENGINE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.weigh:
        return weigh(arguments.weigh[0], int(arguments.weigh[1]), arguments.weigh[2])
    rows = measure(arguments.problems.split(","), arguments.rounds, not arguments.no_time, not arguments.no_memory)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "rows.json").write_text(json.dumps(rows, indent=1))
    parts = []
    for value, title, digits, file in (
        ("ratio", "time / naive", 2, None),
        ("seconds", "seconds", 2, "time.png"),
        ("MiB", "peak memory growth, MiB", 0, "memory.png"),
    ):
        if any(value in row for row in rows):
            parts += [title, "", table(rows, value, digits), ""]
            if file is not None:
                picture(rows, value, title, arguments.out / file)
    (arguments.out / "table.md").write_text("\n".join(parts) + "\n")
    return None


if __name__ == "__main__":
    main()
