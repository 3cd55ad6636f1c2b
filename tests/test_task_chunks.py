"""A meta-batch a few tasks at a time: the numbers of the whole, whatever differentiates it, in less memory."""

import warnings

import pytest
import torch
from cases import ESTIMATORS, OPTIMIZERS

import metaopt as mo
from metaopt import tree
from metaopt.verify.memory import peak_bytes

F64 = torch.float64
TASKS = 5
T = 4
PLAIN = [case for case in OPTIMIZERS if case.plain]


def loss(w, lam, batch):
    x, y = batch
    return ((torch.tanh(x @ w["body"]) @ lam["head"] - y) ** 2).mean() + lam["decay"].exp() * (w["body"] ** 2).sum()


def problem(optimizer, wrap=mo.vmapped):
    torch.manual_seed(0)
    lam = {"head": torch.randn(3, 1, dtype=F64), "decay": torch.tensor(-3.0, dtype=F64)}
    w0 = mo.replicated({"body": 0.5 * torch.randn(2, 3, dtype=F64)}, TASKS)

    def draw():
        return (torch.randn(TASKS, 4, 2, dtype=F64), torch.randn(TASKS, 4, 1, dtype=F64))

    return mo.inner_step(wrap(loss), optimizer), wrap(loss), w0, lam, [draw() for _ in range(T)], draw()


def run(step, outer_loss, rest, estimator):
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mo.estimators.NotConvergedWarning)
        return mo.hypergradient(step, outer_loss, *rest, estimator=estimator)


def assert_equal(a, b):
    for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True):
        assert torch.allclose(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("wrap", [mo.vmapped, mo.looped], ids=["stacked", "looped"])
@pytest.mark.parametrize("case", ESTIMATORS, ids=[case.name for case in ESTIMATORS])
def test_every_estimator(case, wrap):
    step, outer_loss, *rest = problem(mo.optim.SGD(lr=0.1, momentum=0.9), wrap)
    whole = run(step, outer_loss, rest, case.make(T))
    for tasks_at_once in (1, 2, 7):
        parts = run(*mo.meta.in_task_chunks(step, outer_loss, tasks_at_once), rest, case.make(T))
        assert_equal(parts.total, whole.total)
        assert_equal(parts.state.w, whole.state.w)
    assert float(tree.norm(whole.total)) > 1e-3


@pytest.mark.parametrize("case", PLAIN, ids=[case.name for case in PLAIN])
def test_every_optimiser(case):
    optimizer = case.make()
    step, outer_loss, *rest = problem(optimizer if optimizer.elementwise else mo.optim.PerTask(optimizer))
    whole, parts = (
        run(*pair, rest, mo.RMD()) for pair in ((step, outer_loss), mo.meta.in_task_chunks(step, outer_loss, 2))
    )
    assert_equal(parts.total, whole.total)
    assert_equal(parts.initial, whole.initial)


def test_online():
    step, outer_loss, w0, lam, batches, outer_batch = problem(mo.optim.Adam(lr=0.1))
    found = []
    for pair in ((step, outer_loss), mo.meta.in_task_chunks(step, outer_loss, 2)):
        reports = mo.online(
            *pair,
            w0,
            lam,
            batches,
            [outer_batch] * T,
            estimator=mo.HyperDistill(gamma=0.9),
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        )
        found.append([report.lam for report in reports][-1])
    assert_equal(*found)


def test_one_chunk_of_graphs_at_a_time():
    torch.manual_seed(0)
    wide = 4096
    lam = torch.randn(1, wide)
    w0 = mo.replicated(torch.zeros(wide, 1), 8)
    data = torch.randn(8, 16, 1), torch.randn(8, 16, 1)

    def inner(w, lam, batch):
        return ((torch.tanh(batch[0] @ lam) @ w - batch[1]) ** 2).mean()

    step = mo.inner_step(mo.vmapped(inner), mo.optim.SGD(lr=0.1))
    outer_loss = mo.vmapped(inner)

    def peak(step, outer_loss):
        return peak_bytes(lambda: mo.hypergradient(step, outer_loss, w0, lam, [data] * 3, data, estimator=mo.RMD()))

    assert peak(*mo.meta.in_task_chunks(step, outer_loss, 1)) < 0.4 * peak(step, outer_loss)


def test_bad_input():
    step, outer_loss, *rest = problem(mo.optim.SGD(lr=0.1))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        mo.meta.in_task_chunks(step, outer_loss, 0)
    rest[2] = [(x, y[0]) for x, y in rest[2]]
    with pytest.raises(
        ValueError, match=r"5 tasks has them on the first axis of every tensor, but one has shape \(4, 1\)"
    ):
        run(*mo.meta.in_task_chunks(step, outer_loss, 2), rest, mo.RMD())
