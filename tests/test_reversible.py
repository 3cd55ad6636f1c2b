"""Reversible learning: the run undone to the bit, few bits per weight, hypergradients close to RMD's."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import metaopt as mo
from metaopt import tree
from metaopt.trajectory._fixed_point import Remainders, ratio


def problem(momentum=0.9, n=4, **options):
    torch.manual_seed(0)
    H = torch.linspace(0.2, 1.5, n, dtype=torch.float64)

    def loss(w, lam, batch):
        return 0.5 * (H * (w - lam["target"]) ** 2).sum() + 0.1 * (w * batch).cos().sum()

    step = mo.inner_step(loss, mo.optim.SGD(lr=lambda lam, t: lam["lr"], momentum=momentum, **options))
    lam = {"target": torch.randn(n, dtype=torch.float64), "lr": torch.tensor(0.05, dtype=torch.float64)}
    return step, torch.randn(n, dtype=torch.float64), lam


def batch(t):
    return torch.full((), 1.0 + 0.1 * math.sin(t), dtype=torch.float64)


@pytest.mark.parametrize("T", [10, 200, 2000])
def test_the_run_is_undone_to_the_bit(T):
    step, w, lam = problem()
    trajectory = mo.trajectory.Reversible()
    state = step.init(w, lam)
    tape = trajectory.start(state, lam)
    states = []
    for t in range(1, T + 1):
        states.append(state)
        state, tape = trajectory.record(tape, step, state, lam, batch(t))
    wanted = math.log2(1 / 0.9) * T
    assert abs(tape.bits_per_weight() - wanted) <= max(0.1 * wanted, 2.5)  # rounded up to whole bits
    for moment, original in zip(trajectory.moments(tape, step, state), reversed(states), strict=True):
        if original.t == 0:
            assert (moment.state.w - original.w).abs().max() < 2**-52
            assert moment.state.slots["momentum"].abs().max() == 0
        else:
            assert torch.equal(moment.state.w, original.w) and torch.equal(
                moment.state.slots["momentum"], original.slots["momentum"]
            )


@given(T=st.integers(1, 60), momentum=st.sampled_from([0.05, 0.3, 0.5, 0.99, 0.123456]), seed=st.integers(0, 9))
def test_remainders_are_undone_and_leave_nothing(T, momentum, seed):
    generator = torch.Generator().manual_seed(seed)
    beta = ratio(momentum)
    first = v = torch.randint(-(2**55), 2**55, (5,), generator=generator)
    pushes = [torch.randint(-(2**50), 2**50, (5,), generator=generator) for _ in range(T)]
    lost = Remainders(torch.zeros_like(v))
    for g in pushes:
        v = lost.multiply(v, *beta) + g
    for g in reversed(pushes):
        v = lost.divide(v - g, *beta)
    assert torch.equal(v, first) and not lost.below and lost.buffer.abs().max() == 0


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.01, "dampening": 0.2}])
@pytest.mark.parametrize("T", [3, 200])
def test_hypergradients_are_those_of_rmd(T, options):
    step, w, lam = problem(**options)
    batches = [batch(t) for t in range(1, T + 1)]
    outer = lambda w, lam, _: (w**2).sum()  # noqa: E731
    exact = mo.hypergradient(step, outer, w, lam, batches, None, estimator=mo.RMD())
    got = mo.hypergradient(step, outer, w, lam, batches, None, estimator=mo.RMD(mo.trajectory.Reversible()))
    assert float(tree.norm(tree.sub(got.total, exact.total)) / tree.norm(exact.total)) < 1e-9
    assert exact.total["lr"].abs() > 1e-6


def test_a_second_sweep_and_the_check():
    step, w, lam = problem()
    trajectory = mo.trajectory.Checked(mo.trajectory.Reversible())
    state = step.init(w, lam)
    tape = trajectory.of.start(state, lam)
    for t in range(1, 6):
        state, tape = trajectory.of.record(tape, step, state, lam, batch(t))
    first, second = ([m.state.w for m in trajectory.of.moments(tape, step, state)] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("optimizer", [mo.optim.SGD(lr=0.1), mo.optim.SGD(lr=0.1, momentum=0.9, nesterov=True)])
def test_only_momentum_sgd_is_reversible(optimizer):
    _, w, lam = problem()
    step = mo.inner_step(lambda w, lam, b: (w * lam["target"]).sum(), optimizer)
    with pytest.raises(TypeError, match="momentum SGD"):
        mo.hypergradient(
            step, lambda w, lam, _: w.sum(), w, lam, [batch(1)], None, estimator=mo.RMD(mo.trajectory.Reversible())
        )


def test_numbers_out_of_range_are_named():
    step, w, lam = problem()
    with pytest.raises(OverflowError, match="weight left the range"):
        mo.trajectory.Reversible().start(step.init(w * 1e6, lam), lam)
