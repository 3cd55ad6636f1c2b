"""Trajectories: the same numbers however the run is remembered; how often steps are recomputed; what is left behind."""

import os

import pytest
import torch
from cases import TRAJECTORIES, ids
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import metaopt as mo
from metaopt import tree
from metaopt.estimators.cost import Cost, CountedStep
from metaopt.trajectory._rows import Place, Rows
from metaopt.trajectory._weighing import Allocations, weighed
from metaopt.trajectory.interpolated import straight_line
from metaopt.trajectory.revolve import reach

FULL = [case for case in TRAJECTORIES if case.full]


def problem(dropout=False, seed=0):
    """A small net with λ = its first layer and the learning rate; batches of noise."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5 if dropout else 0.0), nn.Tanh(), nn.Linear(4, 1)).double()
    model = mo.functional(net)
    params = {n: 0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in model.params.items()}
    w, body = mo.partition(params, weights=["3.*"])

    def loss(w, lam, batch):
        return (model(mo.merge(w, lam["body"]), batch[0]) - batch[1]).pow(2).mean()

    lam = {"body": body, "lr": torch.tensor(0.05, dtype=torch.float64)}
    step = mo.inner_step(loss, mo.optim.SGD(lr=lambda lam, t: lam["lr"], momentum=0.9))

    def batch(t):
        g = torch.Generator().manual_seed(1000 * seed + t)
        return torch.randn(5, 3, generator=g, dtype=torch.float64), torch.randn(5, 1, generator=g, dtype=torch.float64)

    return step, loss, w, lam, batch


def gradient(trajectory, T, dropout=False, seed=0, batches=None):
    step, loss, w, lam, batch = problem(dropout, seed)
    torch.manual_seed(seed)
    batches = [batch(t) for t in range(1, T + 1)] if batches is None else batches
    hg = mo.hypergradient(step, loss, w, lam, batches, batch(0), estimator=mo.RMD(trajectory), horizon=T)
    return hg


def identical(a, b):
    return all(torch.equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


@pytest.mark.parametrize("case", FULL, ids=ids(FULL))
@pytest.mark.parametrize("dropout", [False, True])
def test_the_same_numbers_to_the_bit(case, dropout):
    for T in (1, 2, 7):
        torch.manual_seed(5)
        expected = gradient(mo.trajectory.Full(), T, dropout)
        before = torch.get_rng_state()
        got = gradient(case.make(T), T, dropout)
        assert identical(got.total, expected.total) and identical(got.initial, expected.initial)
        assert torch.equal(before, torch.get_rng_state())
        assert float(tree.norm(got.indirect)) > 1e-3


@pytest.mark.parametrize("case", FULL, ids=ids(FULL))
def test_a_pullback_can_be_used_twice_and_is_linear(case):
    step, _, w, lam, batch = problem(dropout=True)
    estimator = mo.RMD(case.make(5))
    T = 5
    state = step.init(w, lam)
    carry = estimator.init(step, state, lam)
    for t in range(1, T + 1):
        torch.rand(3)  # something else draws between the steps
        state, carry = estimator.advance(step, state, lam, batch(t), carry)
    _, pullback = estimator.respond(step, state, lam, carry)
    alpha = tree.map(torch.ones_like, state.w)
    once = pullback(alpha)
    again = pullback(alpha)
    double = pullback(tree.scale(2.0, alpha))
    assert identical(once.lam, again.lam)
    assert torch.allclose(2 * once.lam["lr"], double.lam["lr"], rtol=1e-12)


def repetitions(trajectory, T):
    """Per step, how often Φ was run forward after the run itself; and the most states held at once."""
    counts = [0] * (T + 1)
    most = 0

    def fn(state, lam, batch):
        counts[batch] += 1
        return mo.InnerState(state.w * lam, state.slots, state.t + 1)

    class Plain(mo.inner.CustomStep):
        def __call__(self, state, lam, batch):
            return mo.InnerState(fn(state, lam, batch).w.detach(), {}, state.t + 1)

    step = Plain(fn)
    lam = torch.ones((), dtype=torch.float64)
    state = step.init(torch.ones(1, dtype=torch.float64), lam)
    tape = trajectory.start(state, lam)
    for t in range(1, T + 1):
        state, tape = trajectory.record(tape, step, state, lam, t)
        most = max(most, len(tape.held))
    run = list(counts)
    for t, moment in zip(range(T, 0, -1), trajectory.moments(tape, step, state), strict=True):
        assert moment.batch == t and moment.state.t == t - 1
    return [c - r for c, r in zip(counts, run, strict=True)][1:], most


def test_a_thousand_steps_with_seventeen_slots():
    again, most = repetitions(mo.trajectory.Checkpointed(slots=17), 1000)
    assert max(again) == 3 and most == 17
    again, most = repetitions(mo.trajectory.Checkpointed(slots=17, horizon=1000), 1000)
    assert max(again) == 2 and most == 17


@given(slots=st.integers(1, 7), T=st.integers(1, 60), known=st.booleans())
def test_binomial_checkpointing_keeps_its_bound(slots, T, known):
    again, most = repetitions(mo.trajectory.Checkpointed(slots, horizon=T if known else None), T)
    r = next(r for r in range(T + 1) if reach(slots, r) >= T)
    assert most <= slots
    assert max(again) <= r


@given(T=st.integers(1, 80), every=st.integers(1, 9))
def test_periodic_checkpoints_recompute_once(T, every):
    assert max(repetitions(mo.trajectory.Checkpointed(every=every), T)[0]) <= 1
    again, most = repetitions(mo.trajectory.Checkpointed("sqrt"), T)
    assert max(again) <= 1 and most <= 2 * T**0.5 + 2


def test_a_wrong_horizon_costs_time_only():
    for horizon in (1, 4, 30):
        got = gradient(mo.trajectory.Checkpointed(slots=3, horizon=horizon), 9)
        assert identical(got.total, gradient(mo.trajectory.Full(), 9).total)


def test_batches_are_asked_for_again_and_compared():
    batch = problem()[4]
    trajectory = mo.trajectory.Checkpointed(slots=3, batches=batch)
    got = gradient(trajectory, 8, batches=batch)
    assert identical(got.total, gradient(mo.trajectory.Full(), 8, batches=batch).total)

    def impure(t):
        return tuple(x + torch.rand(1, dtype=torch.float64) for x in batch(t))

    with pytest.raises(RuntimeError, match=r"batches\(8\) gave another batch"):
        gradient(mo.trajectory.Checkpointed(slots=3, batches=impure), 8, batches=impure)


def test_memory_does_not_grow_with_the_horizon():
    step, _, w, lam, batch = problem(dropout=True)
    trajectory = mo.trajectory.Checkpointed(slots=4, batches=batch)
    state = step.init(w, lam)
    tape = trajectory.start(state, lam)
    for t in range(1, 60):
        state, tape = trajectory.record(tape, step, state, lam, batch(t))
    assert len(tape.held) == 4
    assert sum(rng is not None for rng in tape.rngs) == 1  # dropout draws, but nothing else does in between
    assert all(isinstance(b, int) for b in tape.batches)


def test_files_are_gone_at_once(tmp_path):
    step, _, w, lam, batch = problem()
    trajectory = mo.trajectory.Offloaded(directory=str(tmp_path / "states"))
    state = step.init(w, lam)
    tape = trajectory.start(state, lam)
    for t in range(1, 4):
        state, tape = trajectory.record(tape, step, state, lam, batch(t))
        assert os.listdir(tmp_path / "states") == []
    with pytest.raises(ValueError, match="either device or directory"):
        mo.trajectory.Offloaded()


def test_a_step_that_cannot_be_replayed_is_named():
    draws = iter(range(100))

    def loss(w, lam, batch):
        return ((w - lam * (1 + 0.1 * (next(draws) == 5))) ** 2).sum()

    step = mo.inner_step(loss, mo.optim.SGD(lr=0.1))
    w = torch.zeros(2, dtype=torch.float64)
    lam = torch.ones(2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="step 6: run again"):
        mo.hypergradient(
            step,
            lambda w, lam, b: w.sum(),
            w,
            lam,
            [0] * 8,
            0,
            estimator=mo.RMD(mo.trajectory.Checked(mo.trajectory.Full())),
        )
    with pytest.raises(ValueError, match="nothing to check"):
        mo.trajectory.Checked(mo.trajectory.Interpolated())


def test_a_batch_changed_in_place_is_found():
    step, _, w, lam, batch = problem()
    trajectory = mo.trajectory.Checked(mo.trajectory.Checkpointed(slots=2))
    state = step.init(w, lam)
    tape = trajectory.start(state, lam)
    batches = [batch(t) for t in range(1, 6)]
    for b in batches:
        state, tape = trajectory.record(tape, step, state, lam, b)
    batches[1][0].add_(1.0)
    with pytest.raises(RuntimeError, match=r"the batch of step \d at .* was changed in place"):
        list(trajectory.moments(tape, step, state))


@pytest.mark.parametrize("settings", [{"slots": 0}, {"slots": "cube"}, {"every": 0}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match=r"slots|every"):
        mo.trajectory.Checkpointed(**settings)


def test_what_each_trajectory_computes():
    T = 6
    costs = {}
    for name, trajectory in {
        "Full": mo.trajectory.Full(),
        "Graphs": mo.trajectory.Graphs(),
        "every 3": mo.trajectory.Checkpointed(every=3),
    }.items():
        costs[name] = gradient(trajectory, T).cost
    assert costs["Full"] == Cost(steps=T, linearizations=T, products=2 * T)
    assert costs["Graphs"] == Cost(steps=0, linearizations=T, products=2 * T)
    assert costs["every 3"] == Cost(steps=T + T - 2, linearizations=T, products=2 * T)
    assert isinstance(CountedStep(problem()[0], Cost()).cost, Cost)


def test_a_budget_keeps_what_fits():
    step, _, w, lam, batch = problem()
    T = 12
    graphs = {}
    for size in (1, 500, 3000, 1 << 30):
        trajectory = mo.trajectory.Budgeted(size)
        state = step.init(w, lam)
        tape = trajectory.start(state, lam)
        for t in range(1, T + 1):
            state, tape = trajectory.record(tape, step, state, lam, batch(t))
            held = len(tape.states.held) * tape.state_size + sum(graph.size for graph in tape.graphs)
            assert held <= max(size, tape.state_size)
        graphs[size] = len(tape.graphs)
    assert graphs[1] == graphs[500] == 0 < graphs[3000] < T == graphs[1 << 30]
    assert gradient(mo.trajectory.Budgeted(1 << 30), T).cost.steps == 0
    with pytest.raises(ValueError, match="bytes must be at least 1"):
        mo.trajectory.Budgeted(0)


def by_transform(w, lam, x):
    """A loss with a derivative of its own; the transforms of torch.func refuse the hooks that weigh a graph."""
    slopes = torch.func.vmap(torch.func.grad(lambda x: torch.sin(x @ w).sum() * lam))(x)
    return slopes.pow(2).mean() + lam * w.pow(2).sum()


def test_graphs_are_weighed_with_transforms_inside():
    """What autograd saves, or (where that cannot be seen) what is alive: a little more, as some of it is saved by nobody."""
    w = torch.randn(3, 2).double()
    lam = torch.tensor(0.5).double()
    xs = [torch.randn(4, 3).double() for _ in range(5)]
    step = mo.inner_step(by_transform, mo.optim.SGD(lr=0.1))
    args = step, lambda w, lam, _: w.sum(), w, lam, xs, None
    exact = mo.hypergradient(*args, estimator=mo.RMD()).total
    assert bool(exact != 0)
    assert torch.equal(mo.hypergradient(*args, estimator=mo.RMD(mo.trajectory.Budgeted(1 << 20))).total, exact)
    plain, _, w, lam, batch = problem()
    at = plain.init(w, lam), lam, batch(1)

    def alive():
        with Allocations() as made:
            linearized = plain.linearize(*at)
        return linearized, made.alive()

    saved = weighed(lambda: plain.linearize(*at), at)[1]
    _, made = alive()
    assert 0 < saved <= sum(made.values()) < 3 * saved


def test_drmad_without_a_step():
    step, _, w, lam, _ = problem()
    trajectory = mo.trajectory.Interpolated()
    state = step.init(w, lam)
    assert list(trajectory.moments(trajectory.start(state, lam), step, state)) == []


def test_big_states_are_copied_into_rows():
    rows = Rows()
    states = [mo.InnerState({"a": torch.randn(200, 100), "n": 3}, {"momentum": torch.randn(7)}, t) for t in range(20)]
    kept = [rows.put(state) for state in states]
    assert all(
        identical(a.w["a"], b.w["a"]) and identical(a.slots, b.slots) and a.t == b.t
        for a, b in zip(kept, states, strict=True)
    )
    assert len({state.w["a"].untyped_storage().data_ptr() for state in kept}) == 6  # 1 + 1 + 2 + 4 + 8 + 16 rows
    small = mo.InnerState(torch.ones(3))
    assert rows.put(small) is small


def test_two_places_are_written_in_turn():
    place = Place()
    states = [mo.InnerState({"w": torch.randn(100, 20)}, {"momentum": torch.randn(7)}, t) for t in range(4)]
    kept = []
    for state in states:
        kept.append(place.put(state))
        assert identical(kept[-1][:2], state[:2]) and kept[-1].w["w"] is not state.w["w"]
    assert kept[2].w["w"] is kept[0].w["w"] and kept[3].w["w"] is kept[1].w["w"]
    assert kept[1].w["w"] is not kept[0].w["w"]
    other_shape = place.put(mo.InnerState({"w": torch.randn(1, 20)}, {}))
    assert other_shape.w["w"].shape == (1, 20)
    small = mo.InnerState(torch.ones(3))
    assert Place().put(small) is small


@pytest.mark.parametrize(
    ("numbers", "dtype"), [(3, torch.float64), (3, torch.float32), (3, torch.bfloat16), (20_000, torch.float32)]
)
def test_the_straight_line_however_many_states_are_made_at_once(numbers, dtype):
    def state(t):
        return mo.InnerState(
            {"a": torch.randn(numbers, dtype=dtype), "b": torch.randn((), dtype=dtype)},
            {"count": torch.tensor(t), "m": torch.randn(2)},
            t,
        )

    first = state(5)
    last = state(40)
    T = 35
    line = list(straight_line(first, last, T))
    assert [point.t for point in line] == list(range(39, 4, -1))
    for point in line:
        assert point.slots["count"] == 40
        expected = tree.lerp(first._replace(t=0), last._replace(t=0), (point.t - 5) / T)
        for mine, theirs in zip(tree.floats(point), tree.floats(expected), strict=True):
            assert mine.dtype == theirs.dtype
            torch.testing.assert_close(
                mine, theirs, rtol=1e-15 if dtype == torch.float64 and mine.dtype == dtype else 1e-6, atol=1e-6
            )
    assert len(list(straight_line(first, last, 1))) == 1
