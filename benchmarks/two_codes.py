"""``python -m benchmarks.two_codes OLD``: one engine under two versions of the library, side by side.

``OLD`` is a checkout of the older version (``git worktree add OLD REVISION``). Each version lives in
its own process. The processes take turns in random order, so that whatever else the machine does
hits both alike. A second process of the older version is the control: it shows what the same code
differs from itself by.
"""

import argparse
import gc
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent.parent
CONTROL = "old, once more"


class Version:
    """A checkout at work in a process."""

    def __init__(self, folder: Path, problem: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--serve", problem]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=folder, env=environment, stdin=pipe, stdout=pipe, text=True)

    def seconds(self, engine: str, T: int) -> float:
        """Processor seconds of one hypergradient."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{T} {engine}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def serve(problem: str) -> None:
    """Answer each line ``T engine`` with the seconds that it took."""
    from benchmarks.engines import ENGINES  # those of the version in PYTHONPATH
    from benchmarks.problems import PROBLEMS

    torch.set_num_threads(1)
    for line in sys.stdin:
        T, engine = line.strip().split(" ", 1)
        torch.manual_seed(0)
        made = PROBLEMS[problem].make(int(T), torch.float32)
        gc.collect()
        start = time.process_time()
        ENGINES[engine](made)
        print(time.process_time() - start, flush=True)


def compare(versions: dict[str, Version], engine: str, T: int, rounds: int) -> None:
    """Print each version's median seconds, and its median ratio to the older one."""
    times: dict[str, list[float]] = {name: [] for name in versions}
    for warm in [False] + [True] * rounds:
        for name in random.sample(list(versions), len(versions)):
            seconds = versions[name].seconds(engine, T)
            if warm:
                times[name].append(seconds)
    for name, own in times.items():
        ratio = statistics.median(b / a for a, b in zip(times["old"], own, strict=True))
        print(f"T={T:<5} {engine:26} {name:15} {1e3 * statistics.median(own):8.2f} ms   {ratio:5.3f} x old", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.two_codes", description=__doc__)
    parser.add_argument("old", type=Path, help="a checkout of the older version")
    parser.add_argument("--problem", default="sinusoid")
    parser.add_argument("--engines", nargs="+", default=["ours: RMD, Full", "ours: RMD, Graphs"])
    parser.add_argument("--horizons", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    old = arguments.old.resolve()
    folders = {"old": old, CONTROL: old, "new": HERE}
    versions = {name: Version(folder, arguments.problem) for name, folder in folders.items()}
    for T in arguments.horizons:
        for engine in arguments.engines:
            compare(versions, engine, T, arguments.rounds)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2])
    else:
        main()
