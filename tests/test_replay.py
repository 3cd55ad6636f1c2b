"""What is replayed is what was run, or an error that names the step and the remedy."""

import numpy as np
import pytest
import torch
from cases import TRAJECTORIES
from torch import nn

import metaopt as mo

F64 = torch.float64
T = 6
REPLAYING = [
    mo.RMD(),
    mo.RMD(mo.trajectory.Checkpointed(2)),
    mo.RMD(mo.trajectory.Checkpointed(every=2)),
    mo.RMD(mo.trajectory.Offloaded("cpu")),
    mo.RMD(mo.trajectory.Budgeted(1)),
    mo.RMD(mo.trajectory.Reversible()),
    mo.TruncatedRMD(3),
]


def optimizer(estimator):
    reversible = isinstance(estimator, mo.RMD) and isinstance(estimator.trajectory, mo.trajectory.Reversible)
    return mo.optim.SGD(lr=0.1, momentum=0.9 if reversible else 0.0)


def hypergradient(loss, estimator, batches, w=None):
    w = torch.ones(3, dtype=F64) if w is None else w
    step = mo.inner_step(loss, optimizer(estimator))
    lam = torch.tensor(0.3, dtype=F64)
    return mo.hypergradient(
        step, lambda w, lam, _: (w**2).sum(), w, lam, batches, None, estimator=estimator, horizon=T
    ).total


def counter():
    calls = []

    def draw():
        calls.append(1)
        return 1.0 + 0.5 * len(calls)

    return draw


def numpy_noise():
    source = np.random.default_rng(0)
    return lambda: torch.as_tensor(source.standard_normal(3))


def own_generator():
    source = torch.Generator().manual_seed(0)
    return lambda: torch.rand(3, generator=source, dtype=F64)


@pytest.mark.parametrize("make", [counter, numpy_noise, own_generator])
@pytest.mark.parametrize("estimator", REPLAYING, ids=repr)
def test_what_changes_from_call_to_call_is_found_out(estimator, make):
    draw = make()
    with pytest.raises(RuntimeError, match=r"step \d had the inner loss .* pass it with the batch"):
        hypergradient(lambda w, lam, _: ((w - lam * draw()) ** 2).sum() + (w**4).sum(), estimator, lambda t: None)


@pytest.mark.parametrize("make", [counter, numpy_noise, own_generator])
@pytest.mark.parametrize("estimator", [mo.RMD(), mo.RMD(mo.trajectory.Checkpointed(2)), mo.FMD()], ids=repr)
def test_the_remedy_is_right(estimator, make):
    def run(draw, lam):
        w = torch.ones(3, dtype=F64, requires_grad=True)
        for _ in range(T):
            loss = ((w - lam * draw()) ** 2).sum()
            w = w - 0.1 * torch.autograd.grad(loss, w, create_graph=True)[0]
        return (w**2).sum()

    lam = torch.tensor(0.3, dtype=F64, requires_grad=True)
    draw = make()
    drawn = [draw() for _ in range(T + 1)]

    def loss(w, lam, t):  # what is drawn comes with the batch, as the error says
        return ((w - lam * drawn[t]) ** 2).sum()

    found = hypergradient(loss, estimator, lambda t: t)
    fixed = iter(drawn[1:])
    (expected,) = torch.autograd.grad(run(lambda: next(fixed), lam), lam)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


LAYERS = [nn.SiLU(), nn.Mish(), nn.GELU(), nn.GroupNorm(2, 8), nn.LayerNorm(8), nn.BatchNorm1d(8), nn.Dropout(0.5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("case", [c for c in TRAJECTORIES if c.make(T).exact], ids=lambda c: c.name)
def test_rounding_is_not_taken_for_another_run(case, layer, dtype):
    torch.manual_seed(0)
    model = mo.functional(nn.Sequential(nn.Linear(3, 8), layer, nn.Linear(8, 1)).to(dtype))
    x = torch.randn(6, 3, dtype=dtype)
    step = mo.inner_step(lambda w, lam, _: lam * model(w, x).pow(2).mean() + 0.1, mo.optim.SGD(lr=0.1, momentum=0.9))
    trajectory = case.make(T)
    estimators = [mo.RMD(trajectory)]
    if not isinstance(trajectory, mo.trajectory.Budgeted):  # which mixes two modes of evaluation
        estimators.append(mo.RMD(mo.trajectory.Checked(trajectory)))
    for estimator in estimators:
        found = mo.hypergradient(
            step,
            lambda w, lam, _: model(w, x).sum(),
            model.params,
            torch.tensor(1.0, dtype=dtype),
            [None] * T,
            None,
            estimator=estimator,
        ).total
        assert found.isfinite()


@pytest.mark.parametrize("estimator", [*REPLAYING, mo.DrMAD()], ids=repr)
def test_a_step_that_writes_into_its_batch_is_refused(estimator):
    batches = [torch.ones(3, dtype=F64) for _ in range(T)]
    with pytest.raises(RuntimeError, match=r"step 1 wrote into its batch.*work on a copy"):
        hypergradient(lambda w, lam, x: ((w - lam * x.sub_(0.3)) ** 2).sum(), estimator, batches)


@pytest.mark.parametrize("estimator", [*REPLAYING, mo.DrMAD()], ids=repr)
def test_one_buffer_for_all_batches_is_refused_with_the_remedy(estimator):
    buffer = torch.zeros(3, dtype=F64)
    with pytest.raises(RuntimeError, match=r"the batch of step \d .*changed in place.*Checkpointed\(batches"):
        hypergradient(lambda w, lam, x: ((w - lam * x) ** 2).sum() + (w**4).sum(), estimator, lambda t: buffer.fill_(t))


def test_one_buffer_is_right_where_it_is_filled_again():
    buffer = torch.zeros(3, dtype=F64)

    def fill(t):
        return buffer.fill_(0.1 * t)

    def loss(w, lam, x):
        return ((w - lam * x) ** 2).sum() + (w**4).sum()

    found = hypergradient(loss, mo.RMD(mo.trajectory.Checkpointed(2, batches=fill)), fill)
    expected = hypergradient(loss, mo.RMD(), lambda t: torch.full((3,), 0.1 * t, dtype=F64))
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("write", [lambda w: w.add_(1.0), lambda w: w.data.add_(1.0), lambda w: w.detach().mul_(2.0)])
@pytest.mark.parametrize("estimator", [mo.RMD(), mo.RMD(mo.trajectory.Graphs()), mo.FMD(), mo.OneStep()], ids=repr)
def test_a_loss_that_writes_into_its_weights_is_refused_and_they_are_left_as_they_were(estimator, write):
    w = torch.ones(3, dtype=F64)

    def loss(w, lam, _):
        with torch.no_grad():
            write(w)
        return ((w - lam) ** 2).sum()

    with pytest.raises(RuntimeError, match="in place"):
        hypergradient(loss, estimator, lambda t: None, w=w)
    assert torch.equal(w, torch.ones(3, dtype=F64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_long_sum_in_half_precision_is_taken_in_float32(dtype):
    """Of 3,000 equal terms, a sum in bfloat16 stops at the 256th."""
    steps = 3_000
    step = mo.inner_step(lambda w, lam, _: (lam.to(w.dtype) * w).sum(), mo.optim.SGD(lr=1e-3))
    hg = mo.hypergradient(
        step,
        lambda w, lam, _: w.sum(),
        torch.ones(1, dtype=torch.float32),
        torch.ones((), dtype=dtype),
        [None] * steps,
        None,
    )
    assert hg.total.dtype == dtype
    assert hg.total.item() == pytest.approx(-3.0, rel=1e-2)


def test_short_runs_of_big_states_take_little_more_than_their_states():
    rows = mo.trajectory._rows.Rows()
    kept = [rows.put(mo.InnerState(torch.randn(100_000), {}, t)) for t in range(2)]
    memory = {state.w.untyped_storage().data_ptr(): state.w.untyped_storage().nbytes() for state in kept}
    assert sum(memory.values()) <= 2 * 4 * 100_000
