"""The step adjoint: both modes agree, fall back aloud, draw the same random numbers, and do no work that is not needed."""

import warnings

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from cases import OPTIMIZERS, ids
from problems import noise_like
from torch import nn

import metaopt as mo
from metaopt import tree
from metaopt.inner import _engine

MODES = [mo.inner.ReverseOverReverse(), mo.inner.ForwardOverReverse()]
BODIES = {
    "tanh": lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)),
    "conv, max pool": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(4, 3)
    ),
    "batch norm": lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Softplus(), nn.Linear(5, 3)),
    "layer norm, GELU": lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 3)),
    "dropout": lambda: nn.Sequential(nn.Linear(6, 5), nn.Sigmoid(), nn.Dropout(0.5), nn.Linear(5, 3)),
    "weight norm": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3)
    ),
}
LOSSES = {"cross-entropy": lambda out, y: F.cross_entropy(out, y.argmax(1)), "mse": F.mse_loss}


def problem(body, criterion, optimizer, adjoint):
    torch.manual_seed(1)
    model = mo.functional(BODIES[body]().double())
    split = next(name for name in model.params)
    lam, w = mo.partition(model.params, weights=[split])
    step = mo.inner_step(
        lambda w, lam, batch: LOSSES[criterion](model(mo.merge(w, lam), batch[0]), batch[1]), optimizer, adjoint=adjoint
    )
    batch = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    return step, {k: v.detach() for k, v in w.items()}, lam, batch


def products(step, w, lam, batch, wrt="both"):
    state = step.init(w, lam)
    torch.manual_seed(3)
    state = step(state, lam, batch)
    cotangent = noise_like(state)
    torch.manual_seed(4)
    return step.vjp(state, lam, batch, cotangent, wrt=wrt)


def close(a, b, tolerance=1e-10):
    for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True):
        assert (x is None) == (y is None)
        assert x is None or not tree.is_float(x) or x.numel() == 0 or (x - y).abs().max() <= tolerance


@pytest.mark.parametrize("criterion", LOSSES)
@pytest.mark.parametrize("body", BODIES)
def test_both_modes_agree(body, criterion):
    optimizer = mo.optim.SGD(lr=0.1, momentum=0.9)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* is impossible here")  # no mode gives way to the other
        reverse, forward = (products(*problem(body, criterion, optimizer, mode)) for mode in MODES)
    close(reverse, forward)
    assert float(tree.norm(reverse[1])) > 1e-6


@pytest.mark.parametrize("case", OPTIMIZERS, ids=ids(OPTIMIZERS))
def test_both_modes_agree_for_every_optimizer(case):
    reverse, forward = (products(*problem("tanh", "mse", case.make(), mode)) for mode in MODES)
    close(reverse, forward)


@pytest.mark.parametrize("mode", MODES, ids=lambda m: type(m).__name__)
def test_the_adjoint_is_that_of_autograd(mode):
    step, w, lam, batch = problem("batch norm", "cross-entropy", mo.optim.SGD(lr=0.1, momentum=0.9), mode)
    state = step.init(w, lam)
    state_ = tree.attach(state)
    lam_ = tree.attach(lam)
    new = step(state_, lam_, batch)
    cotangent = noise_like(tree.detach(new))
    expected = torch.autograd.grad(tree.floats(new), tree.floats(state_) + tree.floats(lam_), tree.floats(cotangent))
    got = step.vjp(state, lam, batch, cotangent)
    close(tree.floats(got[0]) + tree.floats(got[1]), list(expected), 1e-12)


def test_forward_mode_gives_way_aloud_and_once():
    model = mo.functional(nn.Sequential(nn.Linear(6, 4), nn.GroupNorm(2, 4), nn.SiLU(), nn.Linear(4, 1)).double())
    lam, w = mo.partition(model.params, weights=["0.*"])
    forward = mo.inner.ForwardOverReverse()
    x = torch.randn(3, 6, dtype=torch.float64)
    results = []
    for adjoint in (mo.inner.ReverseOverReverse(), forward):
        step = mo.inner_step(
            lambda w, lam, batch: model(mo.merge(w, lam), batch).pow(2).sum(), mo.optim.SGD(lr=0.1), adjoint=adjoint
        )
        alpha = mo.InnerState(tree.map(torch.ones_like, w), None)
        if adjoint is forward:
            with pytest.warns(UserWarning, match="forward over reverse is impossible here"):
                results.append(step.vjp(step.init(w, lam), lam, x, alpha))
            step.vjp(step.init(w, lam), lam, x, alpha)  # warnings are errors here: not said again
        else:
            results.append(step.vjp(step.init(w, lam), lam, x, alpha))
    close(*results)


def test_the_users_module_and_its_statistics_are_left_alone():
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)).double()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    model = mo.functional(net)
    w, lam = mo.partition(model.params, weights=["2.*"])
    step = mo.inner_step(lambda w, lam, x: model(mo.merge(w, lam), x).pow(2).mean(), mo.optim.SGD(lr=0.1))
    x = torch.randn(8, 6, dtype=torch.float64)
    mo.hypergradient(step, step.inner_loss, w, lam, [x] * 3, x, estimator=mo.RMD())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


# -- passes ------------------------------------------------------------------------------------------
class Passes:
    """Counts forward evaluations of the inner loss and backward passes through it (the optimiser's element-wise pullback is none)."""

    def __init__(self, monkeypatch):
        self.forward = self.backward = self.double = 0
        grad = torch.autograd.grad
        products = _engine.products

        def counted_grad(outputs, inputs, grad_outputs=None, **kwargs):
            self.double += "retain_graph" in kwargs
            self.backward += "retain_graph" not in kwargs and grad_outputs is None
            return grad(outputs, inputs, grad_outputs, **kwargs)

        def counted_products(outputs, inputs, seeds, **kwargs):
            self.double += "retain_graph" in kwargs
            self.backward += len(outputs) if "create_graph" in kwargs else 0
            return products(outputs, inputs, seeds, **kwargs)

        monkeypatch.setattr(torch.autograd, "grad", counted_grad)
        monkeypatch.setattr(_engine, "products", counted_products)

    def loss(self, w, lam, batch):
        self.forward += 1
        return ((w * lam - 1) ** 4).sum()


@pytest.mark.parametrize(
    "optimizer", [mo.optim.SGD(lr=0.1, momentum=0.9), mo.optim.Adam(lr=0.1)], ids=lambda o: type(o).__name__
)
def test_the_engine_called_directly_gives_what_torch_gives(optimizer, monkeypatch):
    """Where torch has no such call (another version), the sweep takes torch's own way."""
    model = mo.functional(BODIES["tanh"]().double())
    w, lam = mo.partition(model.params, weights=["2.*"])
    step = mo.inner_step(lambda w, lam, x: model(mo.merge(w, lam), x).pow(2).mean(), optimizer)
    xs = [torch.randn(8, 6, dtype=torch.float64) for _ in range(4)]
    found = [mo.hypergradient(step, step.inner_loss, w, lam, xs[:3], xs[3], estimator=mo.RMD()).total]
    assert _engine._run is not None
    monkeypatch.setattr(_engine, "_run", None)
    found.append(mo.hypergradient(step, step.inner_loss, w, lam, xs[:3], xs[3], estimator=mo.RMD()).total)
    assert all(torch.equal(a, b) and bool(a.any()) for a, b in zip(*map(tree.leaves, found), strict=True))


def test_the_engine_refuses_a_seed_of_another_shape():
    x = torch.randn(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="shape"):
        _engine.products([x.sin()], [x], [torch.ones(2)])


T = 6
# per inner run of T steps: (evaluations of the inner loss, backward passes, contractions of a
# gradient's graph), the outer loss's one backward aside
EXPECTED = {
    "RMD": (mo.RMD(), (2 * T, 2 * T, T)),
    "RMD, graphs": (mo.RMD(mo.trajectory.Graphs()), (T, T, T)),
    "DrMAD": (mo.DrMAD(), (2 * T, 2 * T, T)),
    "OneStep": (mo.OneStep(), (T, T, 1)),
    "HyperDistill": (mo.HyperDistill(), (T + 1, T + 1, 1)),
    "FirstOrder": (mo.FirstOrder(), (T, T, 0)),
    "TruncatedRMD(2)": (mo.TruncatedRMD(2), (T + 2, T + 2, 2)),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_no_pass_that_is_not_needed(name, monkeypatch):
    estimator, expected = EXPECTED[name]
    passes = Passes(monkeypatch)
    step = mo.inner_step(passes.loss, mo.optim.SGD(lr=0.1, momentum=0.9))
    w = torch.full((2,), 0.5)
    lam = torch.full((2,), 0.7)
    mo.hypergradient(step, lambda w, lam, _: (w * lam).sum(), w, lam, [None] * T, None, estimator=estimator)
    assert (passes.forward, passes.backward - 1, passes.double) == expected


def test_online_passes_per_step(monkeypatch):
    w = torch.full((2,), 0.5)
    lam = torch.full((2,), 0.7)
    per_step = {}
    for name, estimator in {
        "OneStep": mo.OneStep(),
        "HyperDistill": mo.HyperDistill(theta=0.5),  # fitted
        "FirstOrder": mo.FirstOrder(),
    }.items():
        with monkeypatch.context() as patch:
            passes = Passes(patch)
            step = mo.inner_step(passes.loss, mo.optim.SGD(lr=0.1))
            run = mo.online(
                step,
                lambda w, lam, _: (w * lam).sum(),
                w,
                lam,
                [None] * T,
                [None] * T,
                estimator=estimator,
                optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
            )
            assert sum(1 for _ in run) == T
            per_step[name] = (passes.forward / T, passes.backward / T - 1, passes.double / T)
    assert per_step == {"OneStep": (1, 1, 1), "HyperDistill": (2, 2, 1), "FirstOrder": (1, 1, 0)}
