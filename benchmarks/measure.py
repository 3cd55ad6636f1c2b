"""How every benchmark here measures: times side by side in one process, memory each alone in a fresh one."""

import ctypes
import gc
import multiprocessing
import os
import random
import re
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

Times = dict[str, list[float]]


def seconds(runs: Mapping[str, Callable[[], object]], rounds: int) -> Times:
    """Processor seconds of ``rounds`` calls of each, which take turns in an order drawn anew each round, after a first one that is not counted.

    The processor's time, not the clock's: waiting for other jobs does not count. Nor does the
    garbage of whoever ran before: it is collected between calls. What returns ``None`` does not
    apply and is left out.
    """
    times: Times = {name: [] for name, run in runs.items() if run() is not None}
    order = list(times)
    draw = random.Random(0)
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            gc.collect()
            start = time.process_time()
            runs[name]()
            times[name].append(time.process_time() - start)
    return times


def ratio(times: Times, name: str, base: str) -> float:
    """The median over rounds of (time of ``name`` / time of ``base`` in the same round)."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def alone(measurement: Callable[..., Any], *arguments: Any) -> Any:
    """``measurement(*arguments)`` in a fresh process, which knows nothing of this one but what Python can find by name.

    There glibc gives every tensor over a megabyte memory of its own, which goes back to the system
    when it is freed, so that a peak is of what is alive. In its heap there are holes, too, and
    their size is a matter of luck: one run took 119, 123 and 153 MiB. A ``MALLOC_MMAP_THRESHOLD_``
    in the environment stands.
    """
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "1000000")  # read when a process starts, so not by this one
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        return pool.submit(measurement, *arguments).result()


def growth(run: Callable[[], object]) -> float | None:
    """MiB by which ``run`` raises the peak of this process's resident set over what is resident before (Linux); ``None`` if it does not apply."""
    ctypes.CDLL(None).malloc_trim(0)  # what earlier runs freed goes back, or this one would live in it uncounted
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _resident("VmRSS")
    if run() is None:
        return None
    return (_resident("VmHWM") - before) / 1024


def _resident(what: str) -> int:
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])
