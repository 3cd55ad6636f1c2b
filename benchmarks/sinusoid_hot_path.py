"""What one meta-iteration of the sinusoid experiment (10 tasks, T = 30) costs, side by side, and how much of it is torch.

    python benchmarks/sinusoid_hot_path.py

Prints medians of interleaved runs relative to the 1-step method, and for each method the share of
wall time that torch's profiler sees inside operators (the rest is Python). One thread.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch.profiler import ProfilerActivity, profile

from metaopt.experiments import sinusoid

ROUNDS = 7
RUNS = 10


def seconds(method: sinusoid.Method) -> float:
    config = sinusoid.SinusoidConfig(meta_iterations=RUNS, test_tasks=2, calibration_period=50)
    return sinusoid.run(method, config, seed=0).seconds


def share_in_operators(method: sinusoid.Method) -> float:
    config = sinusoid.SinusoidConfig(meta_iterations=3, test_tasks=2)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as recorded:
        start = time.perf_counter()
        sinusoid.run(method, config, seed=0)
        wall = time.perf_counter() - start
    return 1e-6 * sum(event.self_cpu_time_total for event in recorded.key_averages()) / wall


def main() -> None:
    torch.set_num_threads(1)
    methods = [m for m in sinusoid.METHODS if m.key in ("fo", "one-step", "ift-5-5", "hyperdistill", "rmd")]
    times: dict[str, list[float]] = {m.key: [] for m in methods}
    for m in methods:
        seconds(m)  # warm-up
    for _ in range(ROUNDS):
        for m in methods:
            times[m.key].append(seconds(m))
    base = statistics.median(times["one-step"])
    print(f"{'method':14} {'ms / run':>9} {'/ 1-step':>9} {'in torch operators':>19}")
    for m in methods:
        median = statistics.median(times[m.key])
        ratio = statistics.median(a / b for a, b in zip(times[m.key], times["one-step"], strict=True))
        print(f"{m.key:14} {1e3 * median:9.0f} {ratio:9.2f} {share_in_operators(m):19.0%}")
    print(f"(calibration included: one per {RUNS} runs here, one per 50 by default; 1-step takes {1e3 * base:.0f} ms)")


if __name__ == "__main__":
    main()
