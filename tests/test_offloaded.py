"""States on disk: a killed run leaves nothing, checkpoints bound what is mapped, and a disk that cannot take them is an error."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import metaopt as mo
from metaopt.trajectory import store

RUN = """
import sys, torch, metaopt as mo
step = mo.inner_step(lambda w, lam, b: ((w - lam) ** 2).sum(), mo.optim.SGD(lr=0.1, momentum=0.9))
trajectory = mo.trajectory.Offloaded(directory=sys.argv[1])
state, lam = step.init(torch.zeros(50_000), torch.ones(())), torch.ones(())
tape = trajectory.start(state, lam)
for t in range(1, 1_000_000):
    state, tape = trajectory.record(tape, step, state, lam, None)
    if t == 5:
        print("running", flush=True)
    if t > 200:
        tape = trajectory.start(state, lam)
"""
ON_LINUX = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX")
@pytest.mark.parametrize("names", [False, True], ids=["files without names", "file system that needs names"])
def test_a_killed_run_leaves_nothing_and_the_next_one_works(tmp_path, names):
    directory = tmp_path / "states"
    code = ("import os; del os.O_TMPFILE\n" if names and hasattr(os, "O_TMPFILE") else "") + RUN
    root = str(Path(mo.__file__).parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", code, str(directory)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == "running\n"
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert child.returncode == -signal.SIGKILL
    left = os.listdir(directory)
    assert len(left) <= (1 if names else 0)  # with a name, there is an instant between making a file and mapping it
    assert torch.equal(
        hypergradient(mo.trajectory.Offloaded(directory=str(directory))), hypergradient(mo.trajectory.Full())
    )
    assert os.listdir(directory) == left


def hypergradient(trajectory, T=9):
    step = mo.inner_step(lambda w, lam, b: ((w.sin() - lam * b) ** 2).sum(), mo.optim.SGD(lr=0.1, momentum=0.9))
    batches = [torch.full((3,), float(t)) for t in range(T)]
    return mo.hypergradient(
        step,
        lambda w, lam, b: w.pow(3).sum(),
        torch.ones(3),
        torch.tensor(0.5),
        batches,
        None,
        estimator=mo.RMD(trajectory),
    ).total


def mapped(directory):
    return sum(str(directory) in line for line in Path("/proc/self/maps").read_text().splitlines())


@ON_LINUX
@pytest.mark.parametrize(
    ("settings", "bound"), [({"slots": 3}, 3), ({"every": 4}, 5 + 4), ({"slots": "sqrt"}, 7 + 4)], ids=str
)
def test_checkpoints_on_disk_bound_what_is_mapped(tmp_path, settings, bound):
    checkpoints = mo.trajectory.Checkpointed(**settings)
    trajectory = mo.trajectory.Offloaded(directory=str(tmp_path), of=checkpoints)
    assert torch.equal(hypergradient(trajectory, T=20), hypergradient(mo.trajectory.Full(), T=20))
    assert mapped(tmp_path) == 0  # all given back
    step = mo.inner_step(lambda w, lam, b: (w * lam).pow(2).sum(), mo.optim.SGD(lr=0.1))
    lam = torch.tensor(0.5)
    state = step.init(torch.ones(3), lam)
    tape = trajectory.start(state, lam)
    for _ in range(20):
        state, tape = trajectory.record(tape, step, state, lam, None)
        assert mapped(tmp_path) == len(tape.held) <= bound
    assert os.listdir(tmp_path) == []
    for _ in trajectory.moments(tape, step, state):
        assert mapped(tmp_path) <= bound + 1  # and the state in use


def test_a_full_disk_is_an_error_that_names_the_directory(tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    state = mo.InnerState(torch.zeros(1 << 20))
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OSError, match=r"cannot keep a state of 4,194,304 bytes in .*make room there"):
            store.OnDisk(str(tmp_path)).put(state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []
    assert before is None or len(os.listdir("/proc/self/fd")) == before


def test_a_directory_that_cannot_be_written_to_is_named(tmp_path):
    occupied = tmp_path / "file"
    occupied.write_text("")
    with pytest.raises(OSError, match=r"cannot keep a state .*file.*give another directory"):
        store.OnDisk(str(occupied)).put(mo.InnerState(torch.zeros(3)))
