"""``tune`` and ``online``: they go on to the bit after a kill, refuse files of other runs, and count what they leave out."""

import os
import signal
import subprocess
import sys
import traceback

import pytest
import torch

import metaopt as mo
from metaopt import tree

SCRIPT = """
import os, signal, sys, torch
import metaopt as mo
torch.set_num_threads(1)
torch.manual_seed(3)
loop, path, die_at, noise = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "noise"
net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.5) if noise else torch.nn.Tanh(), torch.nn.Linear(4, 1))
model = mo.functional(net)
lam = torch.tensor([-1.0, 0.5])

def loss(w, lam, x):
    return model(w, x).pow(2).mean() + lam.exp().sum() * sum(v.pow(2).sum() for v in w.values())

def outer(w, lam, x):
    return (model(w, x) - 1.0).pow(2).mean()

def batches(t):
    return torch.randn(5, 3)  # from torch's global generator

step = mo.inner_step(loss, mo.optim.Adam(lr=0.05))
settings = dict(
    estimator=mo.HyperDistill(gamma=0.9) if loop == "online" else mo.RMD(),
    optimizer=lambda params: torch.optim.Adam(params, lr=0.1),
    scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
    checkpoint=path or None,
)
if loop == "online":
    reports = mo.online(step, outer, model.params, lam, batches, batches, horizon=12, checkpoint_every=2, **settings)
else:
    reports = mo.tune(step, outer, model.params, lam, batches, torch.ones(5, 3), horizon=4, runs=6, **settings)
for report in reports:
    if report.number == die_at:
        os.kill(os.getpid(), signal.SIGKILL)
torch.save({"lam": report.lam, "w": report.state.w, "loss": report.outer_loss, "rng": torch.get_rng_state()}, sys.argv[5])
"""


def run(tmp_path, loop, path, die_at, noise, name):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    out = tmp_path / name
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, loop, str(path), str(die_at), noise, str(out)], env=environment, check=False
    )
    return done.returncode, torch.load(out) if out.exists() else None


@pytest.mark.parametrize("noise", ["noise", "none"])
@pytest.mark.parametrize(("loop", "kills"), [("tune", [2, 5]), ("online", [5, 10])])
def test_killed_and_resumed_it_is_the_same_run_to_the_bit(tmp_path, loop, kills, noise):
    code, whole = run(tmp_path, loop, "", 0, noise, "whole")
    assert code == 0
    for kill in kills:
        code, _ = run(tmp_path, loop, tmp_path / "run.pt", kill, noise, "killed")
        assert code == -signal.SIGKILL
    code, resumed = run(tmp_path, loop, tmp_path / "run.pt", 0, noise, "resumed")
    assert code == 0
    for name in whole:
        for one, other in zip(tree.leaves(whole[name]), tree.leaves(resumed[name]), strict=True):
            assert torch.equal(one, other), name
    code, again = run(tmp_path, loop, tmp_path / "run.pt", 0, noise, "again")  # a finished run is read
    assert code == 0 and torch.equal(again["lam"], whole["lam"])


# -- files ---------------------------------------------------------------------------------------
def loss(w, lam, x):
    return (lam.exp() * (w - x) ** 2).sum()


STEP = mo.inner_step(loss, mo.optim.SGD(lr=0.1))
LOOPS = {
    "tune": lambda path, **changes: mo.tune(
        **{
            "step": STEP,
            "outer_loss": lambda w, lam, x: (w - x).pow(2).sum(),
            "w0": torch.zeros(2),
            "lam": torch.tensor(0.0),
            "batches": [torch.ones(2)] * 3,
            "outer_batch": torch.ones(2),
            "optimizer": lambda p: torch.optim.Adam(p, lr=0.1),
            "runs": 3,
            "checkpoint": path,
            **changes,
        }
    ),
    "online": lambda path, **changes: mo.online(
        **{
            "step": STEP,
            "outer_loss": lambda w, lam, x: (w - x).pow(2).sum(),
            "w0": torch.zeros(2),
            "lam": torch.tensor(0.0),
            "batches": [torch.ones(2)] * 6,
            "outer_batches": [torch.ones(2)] * 6,
            "estimator": mo.OneStep(),
            "optimizer": lambda p: torch.optim.Adam(p, lr=0.1),
            "checkpoint": path,
            "checkpoint_every": 2,
            **changes,
        }
    ),
}
CHANGES = {
    "estimator": {"estimator": mo.TruncatedRMD(2)},
    "lr": {"optimizer": lambda p: torch.optim.Adam(p, lr=0.2)},
    "optimizer": {"optimizer": lambda p: torch.optim.SGD(p, lr=0.1)},
    "lam": {"lam": torch.tensor(0.5)},
    "w0": {"w0": torch.ones(2)},
    "step": {"step": mo.inner_step(loss, mo.optim.SGD(lr=0.2))},
    "clip_norm": {"clip_norm": 1.0},
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("loop", LOOPS)
def test_a_file_of_a_run_with_other_settings_is_refused_with_the_difference(tmp_path, loop, what):
    path = tmp_path / "run.pt"
    next(iter(LOOPS[loop](path)))
    list(LOOPS[loop](path))
    with pytest.raises(ValueError, match=f"run.pt holds a run with other settings: .*{what}"):
        list(LOOPS[loop](path, **CHANGES[what]))


@pytest.mark.parametrize("loop", LOOPS)
def test_a_seed_is_part_of_the_settings(tmp_path, loop):
    path = tmp_path / "run.pt"
    torch.manual_seed(0)
    list(LOOPS[loop](path))
    torch.manual_seed(1)
    with pytest.raises(ValueError, match="seed: 0, now 1"):
        list(LOOPS[loop](path))


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"not a checkpoint"])
@pytest.mark.parametrize("loop", LOOPS)
def test_a_damaged_file_is_named(tmp_path, loop, damage):
    path = tmp_path / "run.pt"
    list(LOOPS[loop](path))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"run.pt is damaged or not a checkpoint.*remove it"):
        list(LOOPS[loop](path))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("loop", LOOPS)
def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch, loop):
    monkeypatch.chdir(tmp_path)
    torch.save(Evil(), "run.pt")
    with pytest.raises(ValueError, match="damaged or not a checkpoint") as raised:
        list(LOOPS[loop](tmp_path / "run.pt"))
    with pytest.raises(ValueError, match="damaged or not a checkpoint"):
        mo.meta.Checkpoint.load(tmp_path / "run.pt")
    assert "weights_only" not in "".join(traceback.format_exception(raised.value))  # torch advises to execute it
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("loop", LOOPS)
def test_a_file_of_another_loop_is_refused(tmp_path, loop):
    path = tmp_path / "run.pt"
    list(LOOPS[loop](path))
    other = "online" if loop == "tune" else "tune"
    with pytest.raises(ValueError, match=f"a checkpoint of {loop}, not of {other}"):
        list(LOOPS[other](path))


# -- guards --------------------------------------------------------------------------------------
def explosive(w, lam, x):
    """An outer loss that is not finite for the second batch."""
    return (w - x).pow(2).sum() * torch.where(x[0] > 5, torch.inf, 1.0)


BAD = [torch.ones(2), torch.full((2,), 9.0), torch.ones(2), torch.ones(2)]


def runs_of(guard, loop):
    if loop == "online":
        return LOOPS[loop](None, outer_loss=explosive, batches=[torch.ones(2)] * 4, outer_batches=BAD, guard=guard)
    data = iter(BAD)
    return LOOPS[loop](
        None,
        outer_loss=explosive,
        batches=None,
        outer_batch=None,
        tasks=lambda run: ([torch.ones(2)] * 3, next(data)),
        runs=4,
        guard=guard,
    )


@pytest.mark.parametrize("loop", LOOPS)
def test_what_is_not_finite_is_raised_skipped_or_stops(loop):
    with pytest.raises(FloatingPointError):
        list(runs_of("raise", loop))
    skipped = list(runs_of("skip", loop))
    assert [report.skipped for report in skipped] == [0, 1, 1, 1]
    assert torch.equal(skipped[0].lam, skipped[1].lam) and not torch.equal(skipped[1].lam, skipped[2].lam)
    assert skipped[1].hypergradient is None
    stopped = list(runs_of("stop", loop))
    assert [report.skipped for report in stopped] == [0, 1]
    with pytest.raises(ValueError, match="guard"):
        runs_of("shrug", loop)


# -- settings ------------------------------------------------------------------------------------
def test_lam_would_never_move():
    with pytest.raises(ValueError, match="never"):
        LOOPS["online"](None, hyper_steps=mo.meta.HyperSteps(every=9))


def test_an_estimator_that_must_be_fitted_is_fitted_by_online():
    """θ scales what would otherwise be taken as it is: the first report has the calibrated one's size."""
    distill = mo.HyperDistill(gamma=0.9)
    arguments = STEP, lambda w, lam, x: (w - x).pow(2).sum(), torch.zeros(2), torch.tensor(0.0)
    fitted = mo.meta.calibrated(distill, *arguments, [torch.ones(2)] * 6, torch.ones(2))
    assert fitted.theta != distill.theta
    first = next(iter(LOOPS["online"](None, estimator=distill)))
    plain = next(iter(LOOPS["online"](None, estimator=mo.HyperDistill(gamma=0.9, pi="plain"))))
    torch.testing.assert_close(first.hypergradient.total, fitted.theta * plain.hypergradient.total)


def test_reports_are_read_at_a_glance():
    report = next(iter(LOOPS["tune"](None)))
    assert "Report(1: outer loss" in repr(report) and "tensor" not in repr(report)
    assert report.norms and report.seconds > 0 and report.bytes > 0
