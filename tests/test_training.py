"""The loops: outer optimisers, online runs, initial weights, meta-training."""

import contextlib
import functools
import os
import signal
import subprocess
import sys

import pytest
import torch

import metaopt as mo
from metaopt.meta import (
    FOMAML,
    Checkpoint,
    Fixed,
    HyperSteps,
    MetaTask,
    MetaTraining,
    OuterOptimizer,
    Reptile,
    SizeWarning,
    replicated,
    vmapped,
)

F64 = torch.float64
sgd = functools.partial(torch.optim.SGD, lr=0.1)


def quadratic(w, lam, batch):
    return 0.5 * ((w - lam) ** 2).sum()


def linear(w, lam, batch):
    return (w * batch).sum()


STEP = mo.inner_step(quadratic, mo.optim.SGD(lr=0.5))


# -- the outer optimiser -------------------------------------------------------------------------
def test_outer_leaves_the_users_lam_and_optimiser_alone():
    lam = {"a": torch.ones(2, dtype=F64), "b": torch.zeros(1, dtype=F64)}
    optimizer = torch.optim.Adam(list(lam.values()), lr=0.1)
    outer = OuterOptimizer(lam, optimizer)
    outer.update({"a": torch.ones(2, dtype=F64), "b": torch.ones(1, dtype=F64)})
    assert torch.equal(lam["a"], torch.ones(2, dtype=F64))
    assert not optimizer.state
    assert torch.allclose(outer.lam["a"], torch.full((2,), 0.9, dtype=F64))


def test_a_configured_optimiser_keeps_its_groups_and_state():
    a = torch.ones(1, dtype=F64)
    b = torch.ones(1, dtype=F64)
    optimizer = torch.optim.SGD([{"params": [a], "lr": 1.0}, {"params": [b], "lr": 0.01}], momentum=0.9)
    a.grad = torch.ones(1, dtype=F64)
    b.grad = torch.ones(1, dtype=F64)
    optimizer.step()  # momentum buffers are now 1
    outer = OuterOptimizer([a, b], optimizer)
    before = [x.clone() for x in outer.lam]
    outer.update([torch.zeros(1, dtype=F64)] * 2)
    assert torch.allclose(before[0] - outer.lam[0], torch.tensor([0.9], dtype=F64))
    assert torch.allclose(before[1] - outer.lam[1], torch.tensor([0.009], dtype=F64))
    with pytest.raises(ValueError, match="not leaves of lam"):
        OuterOptimizer([a.clone()], optimizer)


def test_old_lam_keeps_its_value_after_an_update():
    outer = OuterOptimizer(torch.ones(1), sgd)
    old = outer.lam
    outer.update(torch.ones(1))
    assert old.item() == 1.0
    assert outer.lam.item() == pytest.approx(0.9)


def test_clipping_bounds_the_global_norm_and_projection_bounds_lam():
    outer = OuterOptimizer([torch.zeros(1), torch.zeros(1)], functools.partial(torch.optim.SGD, lr=1.0), clip_norm=1.0)
    given = [torch.tensor([3.0]), torch.tensor([4.0])]
    outer.update(given)
    assert torch.allclose(torch.cat(outer.lam), torch.tensor([-0.6, -0.8]), atol=1e-5)
    assert given[0].item() == 3.0
    projected = OuterOptimizer(torch.zeros(1), sgd, project=lambda lam: lam.clamp(min=0.0))
    assert projected.update(torch.ones(1)).item() == 0.0
    with pytest.raises(ValueError, match="clip_norm"):
        OuterOptimizer(torch.zeros(1), sgd, clip_norm=0.0)


def test_state_dict_resumes_exactly():
    def drive(outer, steps):
        for i in range(steps):
            outer.update(torch.full((2,), float(i + 1), dtype=F64) * outer.lam)
            outer.end_run()
        return outer

    def fresh():
        return OuterOptimizer(
            torch.ones(2, dtype=F64),
            functools.partial(torch.optim.Adam, lr=0.1),
            scheduler=lambda o: torch.optim.lr_scheduler.LinearLR(o),
        )

    first = drive(fresh(), 3)
    resumed = fresh()
    resumed.load_state_dict(first.state_dict())
    assert torch.equal(drive(resumed, 3).lam, drive(first, 3).lam)


# -- online --------------------------------------------------------------------------------------
def test_online_is_the_hand_written_loop():
    """w_t with the old λ, then the 1-step hypergradient at (w_t, λ), then the update: α B = c · 0.5 for this problem."""
    w = torch.zeros(1, dtype=F64)
    lam = torch.ones(1, dtype=F64)
    cs = [torch.full((1,), float(t), dtype=F64) for t in range(1, 6)]
    reports = list(mo.online(STEP, linear, w, lam, [None] * 5, cs, estimator=mo.OneStep(), optimizer=sgd))
    for report, c in zip(reports, cs, strict=True):
        w = w - 0.5 * (w - lam)
        assert torch.allclose(report.hypergradient.total, 0.5 * c)
        lam = lam - 0.1 * 0.5 * c
        assert torch.allclose(report.state.w, w)
        assert torch.allclose(report.lam, lam)
    assert [report.number for report in reports] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("when", "due"),
    [(HyperSteps(), [1, 2, 3, 4, 5, 6]), (HyperSteps(every=2), [2, 4, 6]), (HyperSteps(last=2), [5, 6])],
)
def test_hyper_steps_come_when_they_are_due(when, due):
    reports = list(
        mo.online(
            STEP,
            linear,
            torch.zeros(1),
            torch.ones(1),
            [None] * 6,
            [torch.ones(1)] * 6,
            estimator=mo.OneStep(),
            optimizer=sgd,
            hyper_steps=when,
        )
    )
    assert [r.number for r in reports if r.hypergradient is not None] == due
    assert all((r.outer_loss is not None) == (r.number in due) for r in reports)


@pytest.mark.parametrize(
    ("estimator", "optimizer", "warned"),
    [
        (mo.EvoGrad(noise="gaussian"), torch.optim.SGD, True),
        (mo.EvoGrad(noise="gaussian", unit_rate=True), torch.optim.SGD, False),
        (mo.EvoGrad(noise="gaussian", check_size=False), torch.optim.SGD, False),
        (mo.EvoGrad(noise="gaussian"), torch.optim.Adam, False),
        (mo.OneStep(), torch.optim.SGD, False),
    ],
)
def test_a_size_of_its_own_is_spoken_of_where_the_outer_step_is_proportional_to_it(estimator, optimizer, warned):
    def run():
        args = (
            STEP,
            linear,
            torch.zeros(2),
            torch.ones(2),
            [None] * 3,
            [torch.ones(2)] * 3,
        )
        return list(mo.online(*args, estimator=estimator, optimizer=functools.partial(optimizer, lr=0.1)))

    with (
        pytest.warns(SizeWarning, match=r"EvoGrad.*proportional.*unit_rate=True")
        if warned
        else contextlib.nullcontext() as caught
    ):
        run()
    assert caught is None or len(caught) == 1  # once a run


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("pi", ["theta", "plain", "unit"])
@pytest.mark.parametrize("when", [HyperSteps(), HyperSteps(every=2)], ids=["every step", "every second step"])
def test_hyperdistills_variants_are_the_hand_written_loop(gamma, pi, when):
    """``B = 0.5 diag(w*)`` for the loss ``½|w|² - λ·|w|²/2``; w* the γ-weighted mean of all weights before the step, λ moving between the steps."""
    step = mo.inner_step(lambda w, lam, _: 0.5 * ((1 - lam) * w * w).sum(), mo.optim.SGD(lr=0.5))
    w = torch.tensor([1.0, -2.0], dtype=F64)
    lam = torch.tensor([0.3, 0.2], dtype=F64)
    c = torch.tensor([1.0, 0.5], dtype=F64)
    estimator = mo.HyperDistill(gamma=gamma, theta=0.7, pi=pi)
    past = []
    for report in mo.online(
        step, linear, w, lam, [None] * 6, [c] * 6, estimator=estimator, optimizer=sgd, hyper_steps=when
    ):
        past.append(w)
        w = w - 0.5 * (1 - lam) * w
        torch.testing.assert_close(report.state.w, w, rtol=1e-12, atol=0)
        if report.number % when.every:
            assert report.hypergradient is None
            continue
        weights = torch.tensor([gamma ** (report.number - i) for i in range(1, report.number + 1)], dtype=F64)
        v = c * 0.5 * (weights[:, None] * torch.stack(past)).sum(0) / weights.sum()
        expected = {"theta": 0.7 * weights.sum() * v, "plain": v, "unit": v / v.norm()}[pi]
        torch.testing.assert_close(report.hypergradient.total, expected, rtol=1e-12, atol=0)
        lam = lam - 0.1 * expected


def test_truncated_online_uses_the_lam_of_each_step():
    """Each B_t of this problem is 0.5 whatever λ, A = 0.5: two steps give α (B + B A) = 0.75, although λ moved between them."""
    reports = list(
        mo.online(
            STEP,
            linear,
            torch.zeros(1),
            torch.ones(1),
            [None] * 4,
            [torch.ones(1)] * 4,
            estimator=mo.TruncatedRMD(2),
            optimizer=sgd,
        )
    )
    assert [round(r.hypergradient.total.item(), 6) for r in reports] == [0.5, 0.75, 0.75, 0.75]


def test_estimators_that_need_fixed_lam_are_refused_online():
    for estimator in (mo.RMD(), mo.DrMAD()):
        with pytest.raises(ValueError, match="needs lam fixed"):
            list(
                mo.online(
                    STEP,
                    linear,
                    torch.zeros(1),
                    torch.ones(1),
                    [None],
                    [torch.ones(1)],
                    estimator=estimator,
                    optimizer=sgd,
                )
            )


# -- initial weights and meta-training -----------------------------------------------------------
def test_reptile_and_fomaml_formulas():
    phi = torch.zeros(2)
    last = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    alpha = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert Reptile(1.0).update(phi, last, alpha).tolist() == [2.0, 3.0]
    assert Reptile(0.5).update(phi, last, alpha).tolist() == [1.0, 1.5]
    assert FOMAML(0.1).update(phi, last, alpha).tolist() == pytest.approx([-0.1, -0.1])
    assert Fixed().update(phi, last, alpha) is phi


def task_of(run):
    generator = torch.Generator().manual_seed(run + 1000)
    targets = torch.randn(3, 2, generator=generator, dtype=F64)
    return MetaTask([targets] * 4, [targets] * 4, tasks=3)


def inner(w, lam, target):
    return 0.5 * (lam.exp() * (w - target) ** 2).sum()


def outer(w, lam, target):
    return ((w - target) ** 2).sum()


@pytest.mark.parametrize(
    "estimator",
    [mo.OneStep(), mo.RMD(), mo.DrMAD(), mo.HyperDistill(gamma=0.5, example_axis=1)],
    ids=lambda e: type(e).__name__,
)
@pytest.mark.parametrize("initialisation", [Reptile(0.5), FOMAML(0.01), Fixed()], ids=lambda i: type(i).__name__)
def test_meta_training_lowers_the_outer_loss(estimator, initialisation):
    step = mo.inner_step(vmapped(inner), mo.optim.SGD(lr=0.1))
    training = MetaTraining(step, vmapped(outer), estimator, 4, initialisation=initialisation, calibration_period=10)
    state = OuterOptimizer(torch.zeros(2, dtype=F64), sgd)
    reports = list(training.runs(torch.zeros(2, dtype=F64), state, task_of, 15))
    assert len(reports) == 15
    assert sum(r.outer_losses[-1] for r in reports[-5:]) < sum(r.outer_losses[-1] for r in reports[:5])
    assert torch.equal(reports[-1].lam, state.lam)
    assert (torch.equal(reports[-1].phi, torch.zeros(2, dtype=F64))) == isinstance(initialisation, Fixed)


def test_offline_meta_training_is_one_exact_hypergradient_per_run():
    step = mo.inner_step(vmapped(inner), mo.optim.SGD(lr=0.1))
    training = MetaTraining(step, vmapped(outer), mo.RMD(), 4)
    lam = torch.zeros(2, dtype=F64)
    phi = torch.zeros(2, dtype=F64)
    (report,) = training.runs(phi, OuterOptimizer(lam, sgd), task_of, 1)
    task = task_of(1)
    hg = mo.hypergradient(
        step, vmapped(outer), replicated(phi, 3), lam, task.batches, task.outer_batches[0], estimator=mo.RMD()
    )
    assert torch.allclose(report.lam, lam - 0.1 * hg.total, atol=1e-15)


def test_calibration_happens_when_it_is_due():
    asked = []

    def tasks(run):
        asked.append(run)
        return task_of(run)

    step = mo.inner_step(vmapped(inner), mo.optim.SGD(lr=0.1))
    training = MetaTraining(step, vmapped(outer), mo.HyperDistill(gamma=0.5, example_axis=1), 4, calibration_period=2)
    thetas = [
        r.estimator.theta
        for r in training.runs(torch.zeros(2, dtype=F64), OuterOptimizer(torch.zeros(2, dtype=F64), sgd), tasks, 4)
    ]
    assert asked == [0, 1, 2, -2, 3, 4]
    assert thetas[0] == thetas[1] != thetas[2] == thetas[3]


# -- going on after a kill -----------------------------------------------------------------------
KILLED = """
import sys
from pathlib import Path
from test_training import trained
trained(Path(sys.argv[1]), stop_after=2)
"""


def trained(path, stop_after=None):
    """Five runs with HyperDistill, a checkpoint after each; goes on from the file where there is one."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(9, 4, 2, 3, generator=generator, dtype=F64)

    def inner_loss(w, lam, batch):
        return ((w - batch).tanh().square().sum(-1) * lam.exp().sum()).mean()

    step = mo.inner_step(vmapped(inner_loss), mo.optim.SGD(lr=0.3, momentum=0.9))
    outer = OuterOptimizer(
        torch.zeros(2, dtype=F64),
        functools.partial(torch.optim.Adam, lr=0.1),
        scheduler=lambda o: torch.optim.lr_scheduler.LinearLR(o),
    )
    training = MetaTraining(
        step,
        vmapped(inner_loss),
        mo.HyperDistill(0.9, example_axis=1),
        4,
        initialisation=Reptile(0.5),
        calibration_period=2,
    )
    resume = Checkpoint.load(path) if path is not None and path.exists() else None
    losses = list(resume.notes) if resume else []
    for report in training.runs(
        torch.ones(3, dtype=F64), outer, lambda run: MetaTask([data[run]] * 4, [data[run - 1]] * 4, 4), 5, resume=resume
    ):
        losses += report.outer_losses
        if path is not None:
            report.checkpoint(outer, losses).save(path)
        if report.run == stop_after:
            os.kill(os.getpid(), signal.SIGKILL)
    return losses, report.phi, outer.lam


def test_a_killed_meta_training_goes_on_with_the_same_numbers(tmp_path):
    path = tmp_path / "deep" / "training.pt"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path)], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert Checkpoint.load(path).run == 2
    losses, phi, lam = trained(path)
    expected_losses, expected_phi, expected_lam = trained(None)
    assert losses == expected_losses
    assert torch.equal(phi, expected_phi) and torch.equal(lam, expected_lam)


def test_a_file_that_is_no_checkpoint_is_named(tmp_path):
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04")
    torch.save({"run": 1}, tmp_path / "other.pt")
    for name in ("cut.pt", "other.pt"):
        with pytest.raises(ValueError, match=name):
            Checkpoint.load(tmp_path / name)
