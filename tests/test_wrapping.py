"""What ``functional`` makes of a module: the same function, also in threads, or an error that says why not."""

import threading

import pytest
import torch
from torch import nn

import metaopt as mo

F64 = torch.float64


def data(seed=0):
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(seed), dtype=F64)


def fit(model):
    step = mo.inner_step(lambda w, lam, x: lam * (model(w, x) - 1).square().mean(), mo.optim.SGD(lr=0.1, momentum=0.9))
    lam = torch.tensor(0.7, dtype=F64)
    outer = lambda w, lam, x: model(w, x).square().mean()  # noqa: E731
    return mo.hypergradient(step, outer, model.params, lam, [data(t) for t in range(4)], data(9))


# -- frozen means frozen --------------------------------------------------------------------------
def test_frozen_parameters_are_constants_of_the_model():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    net[0].requires_grad_(False)
    model = mo.functional(net)
    assert set(model.params) == {"2.weight", "2.bias"}
    assert model.frozen["0.weight"].data_ptr() == net[0].weight.data_ptr()  # held once
    got = fit(model)
    assert set(got.state.w) == set(got.state.slots["momentum"]) == {"2.weight", "2.bias"}

    everything = mo.functional(net, trainable="*")
    w, rest = mo.partition(everything.params, weights=["2.*"])
    step = mo.inner_step(
        lambda w, lam, x: lam * (everything({**rest, **w}, x) - 1).square().mean(), mo.optim.SGD(lr=0.1, momentum=0.9)
    )
    outer = lambda w, lam, x: everything({**rest, **w}, x).square().mean()  # noqa: E731
    want = mo.hypergradient(step, outer, w, torch.tensor(0.7, dtype=F64), [data(t) for t in range(4)], data(9))
    torch.testing.assert_close(got.total, want.total, rtol=1e-12, atol=1e-14)
    assert got.total.abs() > 1e-4


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_other_modes_keep_what_is_frozen_and_copy_nothing(mode):
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1)).double()
    net[0].requires_grad_(False)
    model = mo.functional(net)
    other = getattr(model, mode)()
    for name, p in {**model.params, **model.frozen}.items():
        assert {**other.params, **other.frozen}[name].data_ptr() == p.data_ptr()


def test_writing_to_a_frozen_parameter_afterwards_is_an_error():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)).double()
    net[0].requires_grad_(False)
    model = mo.functional(net)
    with torch.no_grad():
        net[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="a frozen parameter was written to"):
        model(model.params, data())


# -- threads --------------------------------------------------------------------------------------
def test_tasks_in_threads_share_one_model():
    model = mo.functional(nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1)).double())
    scales = [0.5 + 0.1 * i for i in range(16)]
    want = [model({k: s * p for k, p in model.params.items()}, data()) for s in scales]
    wrong = []

    def work(i):
        for _ in range(20):
            params = {k: scales[i] * p for k, p in model.params.items()}
            if not torch.equal(model(params, data()), want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# -- the same function as the module --------------------------------------------------------------
class AsksForClasses(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.ReLU(), nn.BatchNorm1d(3), nn.Linear(3, 3)])

    def forward(self, x):
        for layer in self.layers:
            if type(layer) is nn.Linear:
                x = layer(x) + 1
            elif isinstance(layer, nn.BatchNorm1d):
                x = 2 * layer(x)
        return x


class InPlaceAfter(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.pool(self.act(self.conv(x.unflatten(1, (1, 3)).unsqueeze(3).repeat(1, 1, 1, 4))))).sum(0)


@pytest.mark.parametrize("make", [AsksForClasses, InPlaceAfter])
def test_layers_keep_their_classes_and_step_aside(make):
    torch.manual_seed(0)
    net = make().double()
    model = mo.functional(net)
    leaves = {k: p.clone().requires_grad_() for k, p in model.params.items()}
    ours = model(leaves, data())
    theirs = net(data())
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad(ours.sin().sum(), list(leaves.values()), allow_unused=True)
    want = torch.autograd.grad(theirs.sin().sum(), list(net.parameters()), allow_unused=True)
    assert any(x is not None for x in want)
    for x, y in zip(got, want, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def by_list():
    net = nn.Sequential(nn.Linear(3, 1))
    net.weights = [net[0].weight]
    return net


def by_tuple():
    net = nn.Sequential(nn.Linear(3, 1))
    net.both = (net[0].weight, net[0].bias)
    return net


def by_closure():
    net = nn.Sequential(nn.Linear(3, 1))
    layer = net[0]
    net.penalty = lambda: layer.weight.square().sum()
    return net


def with_hook():
    net = nn.Linear(3, 1)
    net.weight.register_hook(lambda g: 2 * g)
    return net


REFUSED = {
    "a list of parameters": (by_list, r"weights\[0\] refers to the parameter '0\.weight'"),
    "a tuple of parameters": (by_tuple, r"both\[0\] refers to the parameter"),
    "a closure over a layer": (by_closure, "refers to a part of the module"),
    "a gradient hook": (with_hook, "has a gradient hook"),
    "max_norm": (lambda: nn.Embedding(5, 3, max_norm=1.0), "writes to its weights in the forward pass"),
    "a lazy module": (lambda: nn.LazyLinear(2), "is not initialised yet"),
    "a scripted module": (lambda: torch.jit.script(nn.Linear(3, 1)), "is scripted or traced"),
    "replicas": (lambda: nn.DataParallel(nn.Linear(3, 1)), "spreads a module over devices"),
    "nothing to train": (lambda: nn.Linear(3, 1).requires_grad_(False), "are frozen"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_what_could_not_be_the_same_function_is_refused(name):
    make, said = REFUSED[name]
    with pytest.raises((TypeError, ValueError), match=said):
        mo.functional(make())


class WritesToItself(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, dtype=F64))

    def forward(self, x):
        with torch.no_grad():
            self.scale.div_(self.scale.norm())
        return x * self.scale


def test_a_forward_pass_that_writes_to_its_weights_is_refused_and_they_stay():
    net = WritesToItself()
    model = mo.functional(net)
    params = {"scale": torch.full((3,), 2.0, dtype=F64)}
    with pytest.raises(RuntimeError, match="writes to the parameter 'scale'"):
        model(params, data())
    assert torch.equal(params["scale"], torch.full((3,), 2.0, dtype=F64))
    assert torch.equal(net.scale, torch.ones(3, dtype=F64))


# -- statistics -----------------------------------------------------------------------------------
def test_running_statistics_in_evaluation_are_asked_for_by_name():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    net(data())
    model = mo.functional(net)
    with pytest.raises(ValueError, match=r"has not moved them\. Say which are meant"):
        model.eval()(model.params, data(1))
    frozen = model.eval(statistics="frozen")(model.params, data(1))
    torch.testing.assert_close(frozen, net.eval()(data(1)), rtol=1e-12, atol=1e-12)
    batch = model.eval(statistics="batch")(model.params, data(1))
    torch.testing.assert_close(batch, net.train()(data(1)), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(frozen, batch)


class ReadsStatistics(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(x) + self.norm.running_mean


def test_statistics_that_are_read_but_not_computed_are_an_error():
    model = mo.functional(ReadsStatistics().double())
    with pytest.raises(RuntimeError, match=r"call model\.with_buffers"):
        model(model.params, data())


def test_hyper_steps_that_never_come_are_refused():
    step = mo.inner_step(lambda w, lam, x: lam * (w - x).square().mean(), mo.optim.SGD(lr=0.1))
    with pytest.raises(ValueError, match="never moves lam in a run of 3 steps"):
        mo.online(
            step,
            lambda w, lam, x: w.sum(),
            torch.zeros(2),
            torch.tensor(1.0),
            [torch.ones(2)] * 3,
            [torch.ones(2)] * 3,
            estimator=mo.OneStep(),
            optimizer=lambda p: torch.optim.SGD(p, 0.1),
            hyper_steps=mo.meta.HyperSteps(every=4),
        )
