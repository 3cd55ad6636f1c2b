"""Runs in parallel processes that end with the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch
from tqdm import tqdm


def run_all(
    run: Callable[..., Any], methods: Sequence[Any], config: Any, seeds: int, *, workers: int | None = None
) -> list[Any]:
    """``run(method, config, seed)`` for every method and seed, with a progress bar.

    Each worker is a process of one thread.

    Returns:
        The runs, by method and then by seed.
    """
    if seeds < 1:
        raise ValueError(f"at least one seed is needed, got {seeds}")
    jobs = [(method, seed) for seed in range(seeds) for method in methods]
    results = {}
    pool = ProcessPoolExecutor(
        min(len(jobs), workers or os.cpu_count() or 1),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(os.getpid(),),
    )
    try:
        futures = {pool.submit(run, method, config, seed): (method.key, seed) for method, seed in jobs}
        with tqdm(total=len(jobs), desc="runs", unit="run") as bar:
            for future in as_completed(futures):
                key, seed = futures[future]
                results[key, seed] = future.result()
                bar.set_postfix_str(f"{key}, seed {seed}")
                bar.update()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)  # the error is told now, not after the other runs
        raise
    pool.shutdown()
    return [results[method.key, seed] for method in methods for seed in range(seeds)]


def _start(parent: int) -> None:
    """A worker has one thread, ends at once on Ctrl-C, and does not outlive its parent."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
