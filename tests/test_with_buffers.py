"""Buffers that move are part of the state: a run is torch's run, and its hypergradient goes through them."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import metaopt as mo


class Block(nn.Module):
    """Two normalised convolutions around a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x):
        return torch.relu(x + self.body(x))


def resnet() -> nn.Module:
    stem = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*stem, Block(4), Block(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


def spectral_norm() -> nn.Module:
    normed = nn.utils.parametrizations.spectral_norm
    return nn.Sequential(normed(nn.Linear(5, 6)), nn.Tanh(), normed(nn.Linear(6, 3)))


MODULES = {"batch norm": (batch_norm, (5,)), "spectral norm": (spectral_norm, (5,)), "resnet": (resnet, (1, 6, 6))}


class Job:
    """A module in training mode inside, in evaluation mode outside, with a learned rate and decay."""

    def __init__(self, name: str, steps: int, size: int = 16) -> None:
        make, shape = MODULES[name]
        torch.manual_seed(0)
        self.module = make().double()
        self.batches = [self.batch(size, shape) for _ in range(steps)]
        self.query = self.batch(3, shape)
        self.model = mo.functional(self.module)
        self.evaluated = self.model.eval()
        self.lam = {"lr": torch.tensor(0.01, dtype=torch.float64), "decay": torch.tensor(0.02, dtype=torch.float64)}
        self.optimizer = mo.optim.SGD(lr=mo.by("lr"), momentum=0.9, weight_decay=mo.by("decay"))
        self.step = mo.inner_step_with_buffers(self.inner, self.optimizer)

    @staticmethod
    def batch(size, shape):
        return 3 + 2 * torch.randn(size, *shape).double(), torch.randint(3, (size,))

    def inner(self, w, lam, batch):
        out, buffers = self.model.with_buffers(w.params, w.buffers, batch[0])
        return cross_entropy(out, batch[1]), buffers

    def outer(self, w, lam, batch):
        out, _ = self.evaluated.with_buffers(w.params, w.buffers, batch[0])
        return cross_entropy(out, batch[1])

    def problem(self):
        return mo.Problem(self.step, self.outer, self.model.moving, self.lam, self.batches, self.query)

    def in_torch(self, lr: float, decay: float) -> tuple[float, nn.Module]:
        module = copy.deepcopy(self.module)
        optimizer = torch.optim.SGD(module.parameters(), lr=lr, momentum=0.9, weight_decay=decay)
        for x, y in self.batches:
            optimizer.zero_grad()
            cross_entropy(module(x), y).backward()
            optimizer.step()
        module.eval()
        return cross_entropy(module(self.query[0]), self.query[1]).item(), module


@pytest.mark.parametrize("name", MODULES)
def test_a_run_is_torchs_run(name):
    job = Job(name, steps=200 if name == "resnet" else 60)
    hg = job.problem().hypergradient(mo.OneStep())
    loss, module = job.in_torch(0.01, 0.02)
    if name == "spectral norm":  # torch holds the vectors constant in the inner gradient, which is not its derivative
        assert hg.outer_loss.item() == pytest.approx(loss, rel=1e-3)
        return
    assert hg.outer_loss.item() == pytest.approx(loss, rel=1e-10)
    expected = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, x in {**hg.state.w.params, **hg.state.w.buffers}.items():
        torch.testing.assert_close(x, expected[name].detach(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["batch norm", "resnet"])  # torch holds spectral norm's vectors constant
@pytest.mark.parametrize("which", ["lr", "decay"])
def test_hypergradient_is_the_difference_quotient_of_torchs_run(name, which):
    job = Job(name, steps=6)
    hg = job.problem().hypergradient(mo.RMD())
    h = 1e-6  # no ReLU changes sides in between
    ends = [job.in_torch(**{k: v.item() + s * h * (k == which) for k, v in job.lam.items()})[0] for s in (1, -1)]
    assert hg.total[which].item() == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-6)


def plain_loop(job):
    """Autograd through every step."""
    lam = mo.tree.map(lambda x: x.clone().requires_grad_(), job.lam)
    state = job.step.init(job.model.moving, lam)
    for batch in job.batches:
        state = job.step(state, lam, batch)
    loss = job.outer(state.w, lam, job.query)
    return dict(zip(lam, torch.autograd.grad(loss, list(lam.values())), strict=True))


EXACT = {
    "RMD": mo.RMD(),
    "Graphs": mo.RMD(mo.trajectory.Graphs()),
    "Checkpointed": mo.RMD(mo.trajectory.Checkpointed(2)),
    "Offloaded": mo.RMD(mo.trajectory.Offloaded(device="cpu")),
    "TruncatedRMD over the run": mo.TruncatedRMD(6),
    "FMD": mo.FMD(),
}


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("estimator", EXACT)
def test_exact_estimators_go_through_the_buffers(module, estimator):
    job = Job(module, steps=6)
    expected = plain_loop(job)
    found = job.problem().hypergradient(EXACT[estimator]).total
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12)


def test_buffers_have_an_initial_gradient():
    job = Job("batch norm", steps=3)
    initial = job.problem().hypergradient(mo.RMD()).initial
    assert initial.buffers["1.running_mean"].abs().sum() > 0  # 0.9³ of them is left


@pytest.mark.parametrize("over", [mo.vmapped, mo.looped])
def test_stacked_tasks_have_statistics_each(over):
    job = Job("batch norm", steps=4)
    tasks = [Job.batch(8, (5,)) for _ in range(3)]
    singles = []
    for task in tasks:
        problem = dataclasses.replace(job.problem(), batches=[task] * 4, outer_batch=task)
        singles.append(problem.hypergradient(mo.RMD()))
    batch = tuple(torch.stack(parts) for parts in zip(*tasks, strict=True))
    step = mo.inner_step_with_buffers(over(job.inner), job.optimizer)
    problem = mo.Problem(step, over(job.outer), job.model.moving, job.lam, [batch] * 4, batch)
    found = problem.hypergradient(mo.RMD())
    for name in job.lam:
        torch.testing.assert_close(found.total[name], sum(hg.total[name] for hg in singles))
    for i, hg in enumerate(singles):
        mean = found.state.w.buffers["1.running_mean"]
        torch.testing.assert_close(mean[i], hg.state.w.buffers["1.running_mean"])


def test_tune_online_and_unroll_carry_them():
    job = Job("batch norm", steps=5)
    for report in job.problem().tune(optimizer=lambda p: torch.optim.SGD(p, lr=1e-3), runs=2):
        last = report
    assert torch.isfinite(torch.as_tensor(last.outer_loss))
    lam = mo.tree.map(lambda x: x.clone().requires_grad_(), job.lam)
    state = mo.unroll(job.step, job.model.moving, lam, job.batches)
    job.outer(state.w, lam, job.query).backward()
    expected = plain_loop(job)
    torch.testing.assert_close(lam["lr"].grad, expected["lr"])


REFUSED = [mo.EvoGrad(), mo.DARTS(), mo.SAMA(), mo.SOBA(), mo.BOME(), mo.F2SA()]


@pytest.mark.parametrize("estimator", REFUSED, ids=lambda e: type(e).__name__)
def test_what_rebuilds_the_step_from_its_loss_refuses(estimator):
    job = Job("batch norm", steps=3)
    with pytest.raises((TypeError, ValueError), match=r"(StepWithBuffers|step with buffers).*use"):
        job.problem().hypergradient(estimator)


def test_compiling_refuses():
    with pytest.raises(TypeError, match="StepWithBuffers"):
        mo.compiled(Job("batch norm", steps=1).step)


def test_reversible_refuses():
    with pytest.raises(TypeError, match="StepWithBuffers"):
        Job("batch norm", steps=2).problem().hypergradient(mo.RMD(mo.trajectory.Reversible()))


class TestErrors:
    def test_weights_without_buffers(self):
        job = Job("batch norm", steps=1)
        with pytest.raises(TypeError, match=r"model\.moving"):
            mo.Problem(job.step, job.outer, job.model.params, job.lam, job.batches, job.query).hypergradient(mo.RMD())

    def test_a_loss_without_buffers(self):
        job = Job("batch norm", steps=1)
        step = mo.inner_step_with_buffers(lambda w, lam, b: job.inner(w, lam, b)[0], job.optimizer)
        with pytest.raises(TypeError, match=r"returns \(loss, buffers\)"):
            step(step.init(job.model.moving, job.lam), job.lam, job.batches[0])

    def test_plain_averages(self):
        with pytest.raises(ValueError, match="momentum=None"):
            mo.functional(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, momentum=None))).moving  # noqa: B018
