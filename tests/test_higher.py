"""`higher` as a second engine: its optimisers as inner optimisers, its full-graph unroll as a reference for ours."""

import runpy
import sys
from pathlib import Path

import higher
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import metaopt as mo
from metaopt import tree
from metaopt.verify import check, reference

# constructor -> settings; eps where ours and higher's differ by where it is added is too small to
# tell
OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.01}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.2}),
    "Nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "Adam": (torch.optim.Adam, {"lr": 0.05, "eps": 1e-20}),
    "AMSGrad": (torch.optim.Adam, {"lr": 0.05, "amsgrad": True, "eps": 1e-20}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.02, "momentum": 0.5, "centered": False}),
    "centered RMSprop": (torch.optim.RMSprop, {"lr": 0.02, "centered": True, "eps": 1e-2}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.1}),
    "Adamax": (torch.optim.Adamax, {"lr": 0.05}),
    "Adadelta": (torch.optim.Adadelta, {"lr": 1.0, "eps": 1e-3}),
    "ASGD": (torch.optim.ASGD, {"lr": 0.1, "lambd": 0.05}),
    "Rprop": (torch.optim.Rprop, {"lr": 0.03}),
}
EVERY = pytest.mark.parametrize("name", OPTIMIZERS)


def net(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)).double()


def batches(horizon, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(6, 3, generator=generator, dtype=torch.float64) for _ in range(horizon + 1)]


LAM = {"l2": torch.tensor([0.1, -0.2, 0.3, 0.2], dtype=torch.float64), "shift": torch.tensor(0.3, dtype=torch.float64)}


def fit(predict, w, lam, batch):
    l2 = sum((rate.exp() * x.square().sum() for rate, x in zip(lam["l2"], w, strict=True)), torch.zeros(()))
    return (predict(batch[:, :2]) - lam["shift"] - batch[:, 2:]).square().mean() + 0.1 * l2


def unrolled(module, optimizer, horizon):
    """The hypergradient from one graph of the whole run, made by higher."""
    *inner, outer = batches(horizon)
    lam = tree.attach(LAM)
    for state in (
        optimizer.state.values()
    ):  # Adagrad has one already, and counts in float32: higher's rate would be good to 7 digits
        state["step"] = state["step"].double()
    with higher.innerloop_ctx(module, optimizer) as (fast, steps):
        for batch in inner:
            steps.step(fit(fast, list(fast.parameters()), lam, batch))
        loss = (fast(outer[:, :2]) - outer[:, 2:]).square().mean()
        return dict(zip(LAM, torch.autograd.grad(loss, tree.leaves(lam), allow_unused=True), strict=True))


def ours(module, optimizer, horizon, estimator=None):
    model = mo.functional(module)
    *inner, outer = batches(horizon)
    step = mo.inner_step(lambda w, lam, batch: fit(lambda x: model(w, x), list(w.values()), lam, batch), optimizer)
    hg = mo.hypergradient(
        step,
        lambda w, lam, batch: (model(w, batch[:, :2]) - batch[:, 2:]).square().mean(),
        model.params,
        LAM,
        inner,
        outer,
        estimator=estimator or mo.RMD(),
    )
    return hg.total


@EVERY
@pytest.mark.filterwarnings("ignore:Differentiable R")
def test_rmd_is_highers_unroll(name):
    make, settings = OPTIMIZERS[name]
    module = net()
    optimizer = make(module.parameters(), **settings)
    want = tree.filled(unrolled(module, optimizer, 4), LAM)
    assert name == "Rprop" or reference.vector(want).norm() > 1e-4
    torch.testing.assert_close(ours(module, mo.interop.from_higher(optimizer, module), 4), want, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(ours(module, mo.interop.from_torch(optimizer, module), 4), want, rtol=1e-9, atol=1e-11)


@EVERY
def test_conversion_is_quiet_and_touches_nothing(name):
    make, settings = OPTIMIZERS[name]
    module = net()
    optimizer = make(module.parameters(), **settings)
    before = tree.clone((dict(module.named_parameters()), optimizer.state_dict()))
    ours(module, mo.interop.from_higher(optimizer, module), 2)
    torch.testing.assert_close((dict(module.named_parameters()), optimizer.state_dict()), before, rtol=0, atol=0)


@EVERY
@given(seed=st.integers(0, 100), steps=st.integers(0, 2))
def test_the_step_keeps_its_contract(name, seed, steps):
    if name == "Rprop":
        return  # its derivatives are zero almost everywhere, and finite differences cross its jumps
    make, settings = OPTIMIZERS[name]
    w = [torch.nn.Parameter(torch.linspace(-1, 1, 3, dtype=torch.float64) + 0.01 * seed)]
    optimizer = make(w, **settings)
    for _ in range(steps):
        optimizer.zero_grad()
        w[0].cosh().sum().backward()
        optimizer.step()
    step = mo.inner_step(lambda w, lam, _: torch.cosh(w[0] - lam).sum(), mo.interop.from_higher(optimizer))
    report = check(step, [w[0].detach()], torch.tensor([0.2, -0.4, 0.5], dtype=torch.float64), seed=seed)
    assert all(row.error < 1e-5 if row.against == "differences" else row.passed for row in report.rows), (
        report
    )  # some are steep


@pytest.mark.parametrize("name", ["momentum", "Adagrad", "RMSprop", "Adamax", "Adadelta", "ASGD", "Rprop"])
def test_a_started_optimizer_goes_on(name):
    make, settings = OPTIMIZERS[name]
    module = net()
    optimizer = make(module.parameters(), **settings)
    for batch in batches(2, seed=1):
        optimizer.zero_grad()
        module(batch[:, :2]).square().mean().backward()
        optimizer.step()
    model = mo.functional(module)
    g = {key: torch.full_like(p, 0.3) for key, p in module.named_parameters()}
    converted = mo.interop.from_higher(optimizer, module)
    step = mo.inner_step(lambda w, lam, _: sum((x * g[key]).sum() for key, x in w.items()) + 0 * lam, converted)
    state = step(step.init(model.params, torch.zeros(())), torch.zeros(()), None)
    for key, p in module.named_parameters():
        p.grad = g[key]
    optimizer.step()
    torch.testing.assert_close(
        state.w, {key: p.detach() for key, p in module.named_parameters()}, rtol=1e-6, atol=1e-9
    )  # torch keeps ASGD's rate in float32


def test_groups_keep_their_settings():
    module = net()
    optimizer = torch.optim.SGD(
        [{"params": module[2].parameters(), "lr": 0.5, "momentum": 0.9}, {"params": module[0].parameters()}], lr=0.1
    )
    torch.testing.assert_close(
        ours(module, mo.interop.from_higher(optimizer, module), 3),
        unrolled(module, optimizer, 3),
        rtol=1e-9,
        atol=1e-11,
    )


@pytest.mark.parametrize(
    "estimator", [mo.RMD(mo.trajectory.Checkpointed()), mo.FMD(), mo.TruncatedRMD(4), mo.DrMAD()], ids=repr
)
def test_other_estimators_take_it(estimator):
    module = net()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05, eps=1e-20)
    got, native = (
        ours(module, make(optimizer, module), 4, estimator) for make in (mo.interop.from_higher, mo.interop.from_torch)
    )
    torch.testing.assert_close(got, native, rtol=1e-8, atol=1e-10)


def test_what_higher_cannot_do_is_an_error():
    w = [torch.nn.Parameter(torch.zeros(2))]
    with pytest.raises(TypeError, match="higher has no differentiable NAdam; it has ASGD, Adadelta"):
        mo.interop.from_higher(torch.optim.NAdam(w))
    with pytest.raises(ValueError, match="higher ignores maximize=True of SGD"):
        mo.interop.from_higher(torch.optim.SGD(w, lr=0.1, maximize=True))
    with pytest.raises(ValueError, match=r"shapes \[\(2,\)\], the weights have shapes \[\(3,\)\]"):
        mo.interop.from_higher(torch.optim.SGD(w, lr=0.1)).init([torch.zeros(3)])


def test_importing_higher_says_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path))  # so that it is compiled again: that is when it warns
    for name in [name for name in sys.modules if name.split(".")[0] == "higher"]:
        monkeypatch.delitem(sys.modules, name)
    assert runpy.run_path(str(Path(mo.interop.__file__).with_name("_quiet.py")))["Patched"]
    assert "higher" in sys.modules


# -- an existing loop of higher, three lines changed ----------------------------------------------
def their_loop(fast, steps, lam, inner, outer, forget=0):
    """An innerloop_ctx loop as users have it; the steps before the last ``forget`` ones are cut off."""
    for t, batch in enumerate(inner):
        steps.step(fit(fast, list(fast.parameters()), lam, batch))
        if forget and t == len(inner) - 1 - forget:
            fast.update_params([p.detach().requires_grad_() for p in fast.parameters()])
    return (fast(outer[:, :2]) - outer[:, 2:]).square().mean()


WAYS = {
    "RMD": (mo.RMD(), 0),
    "RMD, checkpointed": (mo.RMD(mo.trajectory.Checkpointed("sqrt")), 0),
    "RMD, graphs": (mo.RMD(mo.trajectory.Graphs()), 0),
    "FMD": (mo.FMD(), 0),
    "TruncatedRMD": (mo.TruncatedRMD(steps=2), 2),
    "OneStep": (mo.OneStep(), 1),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("started", [False, True])
def test_a_loop_of_higher_gets_every_estimator(way, started):
    estimator, forget = WAYS[way]
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, weight_decay=0.01)
    *inner, outer = batches(5)
    lam = tree.attach(LAM)
    with higher.innerloop_ctx(module, optimizer) as (fast, steps):
        want = torch.autograd.grad(their_loop(fast, steps, lam, inner, outer, forget), tree.leaves(lam))

    with higher.innerloop_ctx(module, optimizer) as (fast, steps):
        if started:  # the loop goes on from the fast weights of now
            with torch.no_grad():
                fast.update_params([p.detach() for p in fast.parameters()])
        before = [p.clone() for p in fast.parameters()]
        model = mo.interop.from_higher(fast)
        step = mo.inner_step(
            lambda w, lam, batch: fit(lambda x: model(w, x), list(w.values()), lam, batch),
            mo.interop.from_higher(steps),
        )
        got = mo.hypergradient(
            step,
            lambda w, lam, batch: (model(w, batch[:, :2]) - batch[:, 2:]).square().mean(),
            model.params,
            LAM,
            inner,
            outer,
            estimator=estimator,
        )
        after = list(fast.parameters())
    for ours_, theirs in zip(tree.leaves(got.total), want, strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-10, atol=1e-12)
        assert theirs.abs().max() > 1e-4
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_a_loop_of_higher_goes_online():
    *inner, _ = batches(5)
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)

    def outer_loss(model):
        return lambda w, lam, batch: (model(w, batch[:, :2]) - batch[:, 2:]).square().mean()

    def last(model, rule):
        step = mo.inner_step(lambda w, lam, b: fit(lambda x: model(w, x), list(w.values()), lam, b), rule)
        loop = mo.online(
            step,
            outer_loss(model),
            model.params,
            LAM,
            inner,
            inner,
            estimator=mo.TruncatedRMD(2),
            optimizer=lambda p: torch.optim.Adam(p, 0.1),
        )
        return list(loop)[-1].lam

    with higher.innerloop_ctx(module, optimizer) as (fast, steps):
        theirs = last(mo.interop.from_higher(fast), mo.interop.from_higher(steps))
    native = last(mo.functional(module), mo.optim.SGD(lr=0.1))
    torch.testing.assert_close(theirs, native, rtol=1e-12, atol=1e-12)
    assert not torch.equal(theirs["shift"], LAM["shift"])


def test_what_of_higher_is_not_taken_over_is_named():
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    rate = torch.tensor(0.1, requires_grad=True)
    with higher.innerloop_ctx(module, optimizer, override={"lr": [rate]}) as (_, steps):
        with pytest.raises(ValueError, match=r"override of \['lr'\] requires grad.*mo\.by\(\"lr\"\)"):
            mo.interop.from_higher(steps)
    callback = higher.get_diff_optim(
        optimizer, module.parameters(), fmodel=higher.monkeypatch(module), grad_callback=lambda g: g
    )
    with pytest.raises(ValueError, match="gradient callback is not taken over"):
        mo.interop.from_higher(callback)
    with pytest.raises(ValueError, match="has no patched module"):
        mo.interop.from_higher(higher.get_diff_optim(optimizer, module.parameters()))
    with pytest.raises(ValueError, match="holds no fast weights"):
        mo.interop.from_higher(higher.patch.make_functional(module))
    with pytest.raises(TypeError, match="got Sequential"):
        mo.interop.from_higher(module)
    model = mo.interop.from_higher(higher.monkeypatch(module))
    with pytest.raises(ValueError, match="params have the names"):
        model({"w": torch.ones(1)}, torch.ones(1, 2))
