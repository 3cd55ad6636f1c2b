"""The golden contract: every public name that others call, called as they call it."""

import re

import higher
import pytest
import torch
from torch import nn

import metaopt as mo

F64 = torch.float64
T = 3


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def data(t=0):
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(t), dtype=F64)
    return x, x.sum(-1, keepdim=True).sin()


def adam(params):
    return torch.optim.Adam(params, lr=0.01)


class Setting:
    """Body and head of a net; the body is λ."""

    def __init__(self):
        self.model = mo.functional(net())
        self.w, self.lam = mo.partition(self.model.params, weights=["2.*"])
        self.loss = lambda w, lam, b: (self.model(mo.merge(w, lam), b[0]) - b[1]).square().mean()
        self.step = mo.inner_step(self.loss, mo.optim.SGD(lr=0.1, momentum=0.9))
        self.batches = [data(t) for t in range(1, T + 1)]
        self.arguments = (self.step, self.loss, self.w, self.lam, self.batches, data())


@pytest.fixture
def given():
    return Setting()


def test_functional():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    module[0].requires_grad_(False)
    model = mo.functional(module)
    assert set(model.params) == {"1.weight", "1.bias", "2.weight", "2.bias"}
    assert set(model.frozen) == {"0.weight", "0.bias"}
    assert set(model.buffers) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    x, _ = data()
    out, buffers = model.with_buffers(model.params, model.buffers, x)
    torch.testing.assert_close(out, model(model.params, x))
    assert not torch.equal(buffers["1.running_mean"], model.buffers["1.running_mean"])
    w, lam = mo.partition(model.params, weights=["2.*"])
    assert mo.merge(w, lam).keys() == model.params.keys()


def test_steps(given):
    step = given.step
    w = given.w
    lam = given.lam
    state = step.init(w, lam)
    assert isinstance(state, mo.InnerState)
    new = step(state, lam, data())
    assert new.w.keys() == w.keys()
    state_bar, lam_bar = step.vjp(state, lam, data(), new)
    assert state_bar.w.keys() == w.keys()
    assert lam_bar.keys() == lam.keys()
    assert step.jvp(state, lam, data(), state, lam).w.keys() == w.keys()
    linear = step.linearize(state, lam, data())
    assert linear.state.t == 1
    assert linear.pullback(new)[1].keys() == lam.keys()
    custom = mo.custom_step(lambda s, lam, b: s._replace(w=s.w * lam, t=s.t + 1), init=lambda w, lam: mo.InnerState(w))
    assert float(custom(custom.init(torch.ones(()), torch.tensor(2.0)), torch.tensor(2.0), None).w) == 2.0


ESTIMATORS = [
    mo.FirstOrder(),
    mo.OneStep(),
    mo.RMD(),
    mo.RMD(trajectory=mo.trajectory.Full()),
    mo.TruncatedRMD(2),
    mo.DrMAD(),
    mo.FMD(),
    mo.IFT(solver=mo.linsolve.Neumann(3)),
    mo.HyperDistill(gamma=0.99, theta=1.0),
    mo.EvoGrad(),
    mo.FDS(2),
    mo.PES(2),
    mo.NRES(),
    mo.ForwardGradient(),
    mo.UORO(),
    mo.SAMA(),
    mo.SOBA(),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
@pytest.mark.filterwarnings("ignore::metaopt.NotConvergedWarning")
@pytest.mark.filterwarnings("ignore::metaopt.ZeroHypergradientWarning")
def test_estimators(given, estimator):
    hg = mo.hypergradient(*given.arguments, estimator=estimator)
    for part in (hg.total, hg.direct, hg.indirect):
        assert part.keys() == given.lam.keys()
    assert hg.outer_loss.ndim == 0
    assert hg.state.w.keys() == given.w.keys()
    assert hg.cost.steps + hg.cost.linearizations > 0
    assert isinstance(estimator.exact, bool)
    assert isinstance(estimator.online, bool)


def test_the_parts_of_an_estimator(given):
    estimator = mo.RMD()
    step = given.step
    lam = given.lam
    state = step.init(given.w, lam)
    carry = estimator.init(step, state, lam)
    for batch in given.batches:
        state, carry = estimator.advance(step, state, lam, batch, carry)
    point, pullback = estimator.respond(step, state, lam, carry)
    response = pullback(point)
    assert response.lam.keys() == lam.keys()
    assert response.initial.w.keys() == given.w.keys()
    assert mo.TruncatedRMD(2).exact is False
    assert mo.OneStep().exact is False
    assert mo.HyperDistill().calibrate is not None


@pytest.mark.parametrize(
    "solver",
    [
        mo.linsolve.Neumann(3),
        mo.linsolve.ConjugateGradient(),
        mo.linsolve.MINRES(),
        mo.linsolve.GMRES(),
        mo.linsolve.Nystrom(2),
        mo.linsolve.Exact(),
        mo.linsolve.Identity(),
    ],
    ids=repr,
)
def test_solvers(given, solver):
    w = torch.zeros(2, dtype=F64)
    lam = torch.ones(2, dtype=F64)
    step = mo.inner_step(lambda w, lam, _: 0.5 * (w - lam).square().sum(), mo.optim.SGD(lr=0.5))
    hg = mo.hypergradient(
        step,
        lambda w, lam, _: w.sum(),
        w,
        lam,
        [None] * 30,
        None,
        estimator=mo.IFT(solver, converged=None, solved=None),
    )
    assert hg.total.shape == (2,)


TRAJECTORIES = [
    mo.trajectory.Full(),
    mo.trajectory.Last(2),
    mo.trajectory.Graphs(),
    mo.trajectory.Budgeted(1 << 20),
    mo.trajectory.Checkpointed(),
    mo.trajectory.Interpolated(),
    mo.trajectory.Reversible(),
    mo.trajectory.Offloaded(device="cpu"),
    mo.trajectory.Checked(mo.trajectory.Full()),
]


@pytest.mark.parametrize("trajectory", TRAJECTORIES, ids=lambda t: type(t).__name__)
def test_trajectories(given, trajectory):
    hg = mo.hypergradient(*given.arguments, estimator=mo.RMD(trajectory))
    assert hg.total.keys() == given.lam.keys()
    assert mo.trajectory.Distilled is not None


def test_the_ways_in(given, tmp_path):
    lam = mo.tree.attach(given.lam)
    state = mo.unroll(given.step, given.w, lam, given.batches, estimator=mo.RMD())
    given.loss(state.w, lam, data()).backward()
    by_unroll = {name: x.grad for name, x in lam.items()}
    hg = mo.hypergradient(*given.arguments)
    torch.testing.assert_close(by_unroll, hg.total)
    assert hg.initial.keys() == given.w.keys()

    *tuned, last = mo.tune(*given.arguments, optimizer=adam, runs=2, checkpoint=tmp_path / "tune.pt")
    assert len(tuned) == 1
    assert last.lam.keys() == given.lam.keys()
    loop = mo.online(
        *given.arguments[:5],
        given.batches,
        estimator=mo.OneStep(),
        optimizer=adam,
        checkpoint=tmp_path / "online.pt",
    )
    assert [type(report) for report in loop] == [type(last)] * T

    problem = mo.Problem(*given.arguments)
    torch.testing.assert_close(problem.hypergradient(mo.RMD()).total, hg.total)
    assert len(list(problem.tune(optimizer=adam, runs=2))) == 2
    assert mo.diagnose.compare([mo.OneStep()], problem, directions=0).parts
    alone = mo.inner_step(lambda w, lam, b: (given.model(w, b[0]) - b[1]).square().mean(), mo.optim.SGD(lr=0.1))
    outer = lambda w, lam, b: (given.model(w, b[0]) - b[1]).square().mean()  # noqa: E731
    two = mo.hypergradient(alone, outer, given.model.params, None, given.batches, [data(), data()], at=(1, 3))
    resumed = mo.unroll(alone, two.state, None, given.batches)
    assert resumed.t == 2 * T


def test_batches_as_users_have_them(given):
    whole = torch.utils.data.TensorDataset(*[torch.cat(part) for part in zip(*given.batches, strict=True)])
    loader = torch.utils.data.DataLoader(whole, batch_size=8)
    want = mo.hypergradient(*given.arguments).total
    kinds = {
        "loader": (loader, None),
        "generator": ((b for b in given.batches), None),
        "cycle": (mo.cycle(loader), T),
        "function": (lambda t: given.batches[t - 1], T),
    }
    for batches, horizon in kinds.values():
        got = mo.hypergradient(*given.arguments[:4], batches, data(), horizon=horizon)
        torch.testing.assert_close(got.total, want)


def test_the_other_rooms(given):
    problem = mo.Problem(*given.arguments)
    assert mo.verify.check(mo.RMD()).passed
    assert mo.verify.check(given.step, given.w, given.lam, data()).passed
    assert mo.verify.check(problem).passed
    assert mo.verify.check(mo.FMD(), problem=problem).passed
    nothing = mo.verify.check(mo.OneStep(), problem=problem)
    assert not nothing.passed
    assert "is an approximation here" in repr(nothing)
    for measure in (mo.diagnose.alignment, mo.diagnose.costs):
        assert measure([mo.OneStep()], problem).rows()
    for measure in (mo.diagnose.norms, mo.diagnose.smoothness, mo.diagnose.preflight):
        assert measure(problem).rows()
    assert mo.diagnose.bias([mo.OneStep()], lambda draw: problem, 2).rows()
    assert mo.diagnose.suggest_estimator(problem).estimator is not None
    for name in ("ANIL", "MAML", "MetaSGD", "WarpGrad", "MetaWeightNet", "FeatureTransform", "RTN"):
        assert issubclass(getattr(mo.models, name), mo.models.MetaModel)
    for name in ("sinusoid", "glyphs", "images", "label_noise"):
        assert getattr(mo.tasks, name) is not None


def test_other_libraries(given):
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    ours = mo.interop.from_torch(optimizer, module)
    step = mo.inner_step(lambda w, lam, b: (given.model(w, b[0]) - b[1]).square().mean(), ours)
    state = step(step.init(given.model.params, None), None, data())
    optimizer.load_state_dict(mo.interop.to_torch(state, optimizer, module))
    assert optimizer.state
    with higher.innerloop_ctx(module, torch.optim.SGD(module.parameters(), lr=0.1)) as (fast, steps):
        assert mo.interop.from_higher(fast).params.keys() == given.model.params.keys()
        assert mo.interop.from_higher(steps).hypers == ()


def test_the_front_door_fits_a_screen():
    assert len(dir(mo)) <= 70
    for room in ("meta", "inner", "estimators"):
        names = getattr(mo, room).__all__
        assert not {"Outer", "Rows", "Place", "Remainders", "Terms", "FinishedRun"} & set(names)


def test_what_is_printed_can_be_read(given):
    """No memory address, and no tensor, in what a public object prints."""
    problem = mo.Problem(*given.arguments)
    hg = problem.hypergradient()
    reports = list(problem.tune(optimizer=adam, runs=1))
    shown = [
        problem,
        hg,
        hg.cost,
        given.model,
        mo.inner_step(adam_loss, mo.optim.Adam(lr=0.1)),
        *ESTIMATORS,
        *TRAJECTORIES,
        *reports,
        mo.diagnose.compare([mo.OneStep()], problem, directions=0),
        mo.verify.check(mo.FirstOrder()),
        mo.vmapped(adam_loss),
        mo.by("lr", mo.optim.positive),
        mo.cycle([1]),
        mo.compiled(given.step, backend="aot_eager").compilation,
    ]
    for thing in shown:
        text = repr(thing)
        assert not re.search(r"0x[0-9a-f]{6}|tensor\(", text.replace("<function adam_loss at 0x", "")), text
    assert "|indirect|" in repr(hg)
    assert "<table>" in hg._repr_html_()


def adam_loss(w, lam, batch):
    return w.sum()
