"""The task axis: what is stacked knows that it is, and each part does the right thing by itself or refuses by name."""

import pickle

import pytest
import torch
from cases import PLAIN_OPTIMIZERS, ids
from torch import nn

import metaopt as mo
from metaopt import tree

F64 = torch.float64
TASKS = 3
T = 4
WAYS = [mo.vmapped, mo.looped]


def inner(w, lam, batch):
    x, y = batch
    return (torch.tanh(x @ w["body"]) @ lam["head"] - y).square().mean() + lam["decay"].exp() * w["bias"].square().sum()


def outer(w, lam, batch):
    x, y = batch
    return (torch.tanh(x @ w["body"] + w["bias"]) @ lam["head"] - y).square().mean()


def draw():
    return torch.randn(TASKS, 5, 2, dtype=F64), torch.randn(TASKS, 5, 1, dtype=F64)


def problem():
    torch.manual_seed(0)
    w = {"body": 2 * torch.randn(2, 4, dtype=F64), "bias": torch.randn(4, dtype=F64)}
    lam = {"head": torch.randn(4, 1, dtype=F64), "decay": torch.tensor(-2.0, dtype=F64)}
    return w, lam, [draw() for _ in range(T)], draw()


def alone(optimizer, w, lam, batches, outer_batch):
    """One hypergradient per task."""
    step = mo.inner_step(inner, optimizer)
    found = []
    for i in range(TASKS):
        mine = [tree.select(batch, i) for batch in batches]
        found.append(mo.hypergradient(step, outer, w, lam, mine, tree.select(outer_batch, i)))
    return found


def total(trees):
    result = trees[0]
    for one in trees[1:]:
        result = tree.add(result, one)
    return result


def assert_close(a, b):
    for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", PLAIN_OPTIMIZERS, ids=ids(PLAIN_OPTIMIZERS))
@pytest.mark.parametrize("way", WAYS)
def test_every_optimiser_keeps_the_tasks_apart_by_itself(case, way):
    w, lam, batches, outer_batch = problem()
    step = mo.inner_step(way(inner), case.make())
    together = mo.hypergradient(step, way(outer), mo.replicated(w, TASKS), lam, batches, outer_batch)
    one_by_one = alone(case.make(), w, lam, batches, outer_batch)
    assert_close(together.total, total([hg.total for hg in one_by_one]))
    assert_close(together.state.w, tree.stack([hg.state.w for hg in one_by_one]))


@pytest.mark.parametrize("way", WAYS)
def test_sum_or_mean_over_tasks_is_said_by_the_argument(way):
    w, lam, _, outer_batch = problem()
    stacked = mo.replicated(w, TASKS).w
    each = torch.stack([outer(w, lam, tree.select(outer_batch, i)) for i in range(TASKS)])
    torch.testing.assert_close(way(outer).each(stacked, lam, outer_batch), each)
    torch.testing.assert_close(way(outer)(stacked, lam, outer_batch), each.sum())
    torch.testing.assert_close(way(outer, reduction="mean")(stacked, lam, outer_batch), each.mean())
    with pytest.raises(ValueError, match="a mean divides the learning rate of each task"):
        mo.inner_step(way(inner, reduction="mean"), mo.optim.SGD(lr=0.1))


@pytest.mark.parametrize("way", WAYS)
def test_a_stacked_loss_can_be_sent_to_another_process(way):
    w, lam, _, outer_batch = problem()
    there = pickle.loads(pickle.dumps(way(outer, reduction="mean")))
    stacked = mo.replicated(w, TASKS).w
    assert there == way(outer, reduction="mean")
    assert torch.equal(there(stacked, lam, outer_batch), way(outer, reduction="mean")(stacked, lam, outer_batch))


@pytest.mark.parametrize("way", WAYS)
def test_copies_for_each_task_are_differentiable(way):
    w, lam, batches, outer_batch = problem()
    w = tree.map(lambda x: x.requires_grad_(), w)
    state = mo.unroll(mo.inner_step(way(inner), mo.optim.SGD(lr=0.1)), mo.replicated(w, TASKS), lam, batches)
    way(outer)(state.w, lam, outer_batch).backward()
    expected = total([hg.initial for hg in alone(mo.optim.SGD(lr=0.1), tree.detach(w), lam, batches, outer_batch)])
    assert_close({name: leaf.grad for name, leaf in w.items()}, expected)


def test_tasks_of_different_sizes_go_by_the_loop():
    w, lam, _, _ = problem()
    sizes = (2, 5, 3)
    ragged = mo.meta.Ragged([(torch.randn(n, 2, dtype=F64), torch.randn(n, 1, dtype=F64)) for n in sizes])
    step = mo.inner_step(mo.looped(inner), mo.optim.SGD(lr=0.1))
    together = mo.hypergradient(step, mo.looped(outer), mo.replicated(w, TASKS), lam, [ragged] * T, ragged)
    one = mo.inner_step(inner, mo.optim.SGD(lr=0.1))
    apart = [mo.hypergradient(one, outer, w, lam, [batch] * T, batch).total for batch in ragged.batches]
    assert_close(together.total, total(apart))
    with pytest.raises(ValueError, match=r"different sizes.*mo\.looped"):
        mo.vmapped(outer)(mo.replicated(w, TASKS).w, lam, (torch.randn(2, 2, dtype=F64), torch.randn(2, 1, dtype=F64)))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(3, 4, batch_first=True)
        self.out = nn.Linear(4, 1)

    def forward(self, x):
        return self.out(self.rnn(x)[0][:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_what_vmap_cannot_do_names_the_loop(kind):
    maml = mo.models.MAML.of(Recurrent(kind), nn.functional.mse_loss)
    w, lam = maml.init()
    batch = torch.randn(2, 5, 6, 3), torch.randn(2, 5, 1)

    def run(way):
        step = mo.inner_step(way(maml.inner_loss), mo.optim.SGD(lr=0.1))
        return mo.hypergradient(step, way(maml.outer_loss), mo.replicated(w, 2), lam, [batch] * 2, batch)

    with pytest.raises(RuntimeError, match=r"mo\.looped\(loss\)"):
        run(mo.vmapped)
    assert run(mo.looped).total["rnn.weight_ih_l0"].norm() > 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("w", "batch", "message"),
    [
        (torch.zeros(3), torch.ones(2, 3), r"2 tasks|3 tasks"),
        (torch.zeros(2, 3), torch.ones(3), r"the batch .* has shape \(3,\)"),
        (torch.zeros(()), torch.ones(2, 3), "without axes"),
    ],
)
def test_what_has_no_task_axis_is_named(way, w, batch, message):
    with pytest.raises(ValueError, match=message):
        way(lambda w, lam, batch: (w - batch).square().sum())(w, None, batch)


@pytest.mark.parametrize("way", WAYS)
def test_the_loss_of_one_task_is_a_scalar(way):
    with pytest.raises(ValueError, match=r"the loss of one task must return a scalar, got a tensor of shape \(3,\)"):
        way(lambda w, lam, batch: (w - batch).square())(torch.zeros(2, 3), None, torch.ones(2, 3))
    with pytest.raises(TypeError, match="a meta-batch already"):
        way(way(inner))


def test_what_rides_along_in_a_batch_is_shared():
    for way in WAYS:
        loss = way(lambda w, lam, batch: (w - batch["x"]).square().sum() * batch["power"])
        assert float(loss(torch.zeros(2, 3), None, {"x": torch.ones(2, 3), "power": 2, "none": None})) == 12.0


def test_hyperdistill_finds_the_examples_behind_the_tasks():
    """By default it is the method with the right axis, whose direction is that of the exact indirect term."""
    w, lam, batches, outer_batch = problem()
    step = mo.inner_step(mo.vmapped(inner), mo.optim.SGD(lr=0.1))
    arguments = step, mo.vmapped(outer), w, lam, batches, outer_batch
    found = mo.hypergradient(*arguments, estimator=mo.HyperDistill(gamma=0.9)).indirect
    told = mo.hypergradient(*arguments, estimator=mo.HyperDistill(gamma=0.9, example_axis=1)).indirect
    assert_close(found, told)
