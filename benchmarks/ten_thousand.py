"""``python -m benchmarks.ten_thousand``.

Memory of exact RMD over T = 100, 1000, 10,000 steps with 17 slots, batches asked for again.
"""

import resource
import time

import torch

import metaopt as mo


def batch(t: int) -> torch.Tensor:
    return torch.rand(2_000, generator=torch.Generator().manual_seed(t))


def growth(T: int) -> float:
    """Growth of the peak in MiB. A state is 16 KB: all of them would be 160 MB at T = 10,000."""
    step = mo.inner_step(lambda w, lam, x: ((w - lam * x) ** 2).sum(), mo.optim.SGD(lr=0.1, momentum=0.9))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trajectory = mo.trajectory.Checkpointed(slots=17, batches=batch)
    w = torch.zeros(2_000)
    lam = torch.ones(2_000)
    mo.hypergradient(step, lambda w, lam, _: w.sum(), w, lam, batch, None, estimator=mo.RMD(trajectory), horizon=T)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


if __name__ == "__main__":
    torch.set_num_threads(1)
    growth(20)
    for T in (100, 1000, 10_000):
        start = time.perf_counter()
        print(f"T={T:<6} grew by {growth(T):6.1f} MiB, {time.perf_counter() - start:.1f} s", flush=True)
