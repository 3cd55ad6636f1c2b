"""``python -m benchmarks.two_codes OLD``: exact RMD under two versions of the library, side by side.

``OLD`` is a checkout of the older version (``git worktree add OLD REVISION``). Each version lives in
its own process. The processes take turns in random order, so that whatever else the machine does
hits both alike. A second process of the older version is the control: it shows what the same code
differs from itself by.

A step is made once, as in a tuning run, so that what a step checks once falls into the round that is
left out. ``--fresh`` makes one for every round.
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
from typing import Any

import torch

HERE = Path(__file__).parent.parent
CONTROL = "old, once more"


class Version:
    """A checkout at work in a process."""

    def __init__(self, folder: Path, problem: str, fresh: bool) -> None:
        environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--serve", problem, "fresh" if fresh else "kept"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=folder, env=environment, stdin=pipe, stdout=pipe, text=True)

    def seconds(self, trajectory: str, T: int) -> float:
        """Processor seconds of one hypergradient."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{T} {trajectory}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def serve(problem: str, fresh: bool) -> None:
    """Answer each line ``T trajectory`` with the seconds that it took."""
    import metaopt as mo  # the version in PYTHONPATH
    from benchmarks.engines.ours import parts
    from benchmarks.problems import PROBLEMS

    torch.set_num_threads(1)
    kept: dict[str, Any] = {}
    for line in sys.stdin:
        T, trajectory = line.split()
        if fresh or T not in kept:
            torch.manual_seed(0)
            made = PROBLEMS[problem].make(int(T), torch.float32)
            kept[T] = (*parts(made), made.batches, made.outer_batch)
        estimator = mo.RMD(getattr(mo.trajectory, trajectory)())
        gc.collect()
        start = time.process_time()
        mo.hypergradient(*kept[T], estimator=estimator)
        print(time.process_time() - start, flush=True)


def compare(versions: dict[str, Version], trajectory: str, T: int, rounds: int) -> None:
    """Print each version's median seconds, and its median ratio to the older one."""
    times: dict[str, list[float]] = {name: [] for name in versions}
    for warm in [False] + [True] * rounds:
        for name in random.sample(list(versions), len(versions)):
            seconds = versions[name].seconds(trajectory, T)
            if warm:
                times[name].append(seconds)
    for name, own in times.items():
        ratio = statistics.median(b / a for a, b in zip(times["old"], own, strict=True))
        print(
            f"T={T:<5} {trajectory:14} {name:15} {1e3 * statistics.median(own):8.2f} ms   {ratio:5.3f} x old",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.two_codes", description=__doc__)
    parser.add_argument("old", type=Path, help="a checkout of the older version")
    parser.add_argument("--problem", default="sinusoid")
    parser.add_argument("--trajectories", nargs="+", default=["Full", "Graphs"])
    parser.add_argument("--horizons", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--fresh", action="store_true", help="a new step for every round")
    arguments = parser.parse_args()
    old = arguments.old.resolve()
    folders = {"old": old, CONTROL: old, "new": HERE}
    versions = {name: Version(folder, arguments.problem, arguments.fresh) for name, folder in folders.items()}
    for T in arguments.horizons:
        for trajectory in arguments.trajectories:
            compare(versions, trajectory, T, arguments.rounds)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], sys.argv[3] == "fresh")
    else:
        main()
