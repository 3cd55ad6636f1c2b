"""The compiled step: the eager numbers, the same random draws, and an audible way back to eager."""

import importlib

import pytest
import torch
from problems import close
from torch import nn

import metaopt as mo
from metaopt import tree
from metaopt.estimators.outer import outer_gradient

F64 = torch.float64


def problem(optimizer, body=(), compile=False, seed=0):
    torch.manual_seed(seed)
    model = mo.functional(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), *body, nn.Linear(4, 1)).double())
    w, lam = mo.partition(model.params, weights=[f"{len(body) + 2}.*"])
    lam["spare"] = torch.ones(2, dtype=F64)
    lam["rate"] = torch.tensor(-2.0, dtype=F64)

    def loss(w, lam, batch):
        params = {name: p for name, p in lam.items() if name not in ("spare", "rate")}
        return (model(mo.merge(w, params), batch[0]) - batch[1]).pow(2).mean()

    batches = [(torch.randn(5, 3, dtype=F64), torch.randn(5, 1, dtype=F64)) for _ in range(4)]
    step = mo.inner_step(loss, optimizer)
    return mo.compiled(step, backend=compile) if compile else step, loss, w, lam, batches


def hypergradient(estimator, *args, **kwargs):
    step, loss, w, lam, batches = problem(*args, **kwargs)
    torch.manual_seed(7)
    with pytest.warns(UserWarning, match="spare") as caught:
        hg = mo.hypergradient(step, loss, w, lam, batches, batches[0], estimator=estimator)
    assert not any("compiled" in str(w.message) for w in caught)
    return step, hg


@pytest.mark.filterwarnings("default")  # torch's own, while it traces
@pytest.mark.parametrize("name", ["SGD with a learned rate", "Adam", "dropout"])
def test_compiled_is_eager(name):
    torch._dynamo.reset()
    optimizer = (
        mo.optim.Adam(lr=0.05)
        if name == "Adam"
        else mo.optim.SGD(lr=lambda lam, t: lam["rate"].exp() / t, momentum=0.9)
    )
    body = (nn.Dropout(0.5),) if name == "dropout" else ()
    for estimator in (mo.RMD(), mo.RMD(mo.trajectory.Graphs())) if name == "dropout" else (mo.RMD(),):
        _, eager = hypergradient(estimator, optimizer, body)
        step, compiled = hypergradient(estimator, optimizer, body, compile="aot_eager")
        assert step.compilation.refused is None
        assert step.compilation.seconds > 0
        assert close(compiled.total, eager.total, 1e-10)
        assert close(compiled.state.w, eager.state.w, 1e-10)
        assert float(tree.norm(eager.indirect)) > 1e-6
        assert compiled.total["spare"].abs().sum() == 0


def test_what_cannot_be_compiled_runs_eagerly_and_says_so_once():
    torch._dynamo.reset()

    def loss(w, lam, batch):
        return ((w - lam) ** 2).sum() * (1.0 if float(w.detach().sum()) > -100 else 2.0)

    args = (lambda w, lam, _: w.sum(), torch.zeros(2), torch.ones(2), [None] * 3, None)
    step = mo.compiled(mo.inner_step(loss, mo.optim.SGD(lr=0.1)), backend="aot_eager")
    with pytest.warns(UserWarning, match="cannot be compiled and runs eagerly") as caught:
        got = mo.hypergradient(step, *args)
    assert len(caught) == 1
    assert step.compilation.refused
    assert torch.equal(got.total, mo.hypergradient(mo.inner_step(loss, mo.optim.SGD(lr=0.1)), *args).total)
    assert torch._C._functorch.peek_interpreter_stack() is None


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["HyperDistill", "OneStep", "RMD"])
def test_compiled_outer_loss_is_eager(name):
    torch._dynamo.reset()
    step, loss, w, lam, batches = problem(mo.optim.SGD(lr=0.1, momentum=0.9))

    def hypergradients(outer_loss):
        if name == "RMD":
            return [
                mo.hypergradient(step, outer_loss, w, lam, batches, batch, estimator=mo.RMD()).total
                for batch in batches
            ]
        reports = mo.online(
            step,
            outer_loss,
            w,
            lam,
            batches,
            batches,
            estimator=getattr(mo, name)(),
            optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        )
        return [report.hypergradient.total for report in reports]

    outer = mo.compiled(loss, backend="aot_eager")
    found = []
    for outer_loss in (loss, outer):
        with pytest.warns(mo.UnusedHyperparameterWarning, match="spare"):
            found.append(hypergradients(outer_loss))
    assert outer.refused is None
    assert outer.seconds > 0
    assert close(found[0], found[1], 1e-12)
    assert float(tree.norm(found[0][-1])) > 1e-6
    assert torch.equal(outer(w, lam, batches[0]), loss(w, lam, batches[0]))


@pytest.mark.filterwarnings("default")
def test_a_compiled_outer_loss_notices_what_changes():
    torch._dynamo.reset()
    model = mo.functional(nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 1)).double())
    settings = {"squared": True}

    def loss(w, lam, x):
        return model(w, x).pow(2 if settings["squared"] else 4).mean() + (lam * w["1.weight"]).sum()

    outer = mo.compiled(loss, backend="aot_eager")
    lam = torch.ones(1, 3, dtype=F64)
    for x in (torch.randn(4, 3, dtype=F64), torch.randn(6, 3, dtype=F64)):
        for settings["squared"] in (True, False):
            for mode in (True, False):
                model = model.train(mode)
                got = []
                for one in (loss, outer, outer):
                    torch.manual_seed(1)
                    got.append(outer_gradient(one, model.params, lam, x))
                assert close(got[1], got[0], 1e-12)
                assert close(got[2], got[0], 1e-12)
    assert outer.refused is None


@pytest.mark.filterwarnings("default")
def test_an_outer_loss_that_cannot_be_compiled_runs_eagerly_and_says_so_once():
    torch._dynamo.reset()
    outer = mo.compiled(
        lambda w, lam, _: (w * lam).sum() * (1.0 if float(w.detach().sum()) > 0 else 2.0), backend="aot_eager"
    )
    with pytest.warns(UserWarning, match="the outer loss cannot be compiled and runs eagerly") as caught:
        found = [outer_gradient(outer, torch.full((2,), -1.0), torch.ones(2), None) for _ in range(4)]
    assert len(caught) == 1
    assert all(alpha.tolist() == [2.0, 2.0] and direct.tolist() == [-2.0, -2.0] for _, alpha, direct in found)
    with pytest.raises(TypeError, match="an outer loss"):
        mo.compiled(None)


def test_constants_of_a_users_module_are_looked_at_whatever_it_is_called(tmp_path, monkeypatch):
    (tmp_path / "torch_helpers.py").write_text("SCALE = 1.0\n\ndef penalty(w):\n    return SCALE * (w**2).sum()\n")
    monkeypatch.syspath_prepend(tmp_path)
    helpers = importlib.import_module("torch_helpers")
    w = torch.tensor([1.0, -2.0])
    lam = torch.tensor(0.3)
    batch = torch.tensor([0.1, 0.2])

    def loss(w, lam, batch):
        return ((w - batch) ** 2).sum() + lam * helpers.penalty(w)

    compiled = mo.compiled(mo.inner_step(loss, mo.optim.SGD(lr=0.1)), backend="aot_eager")
    plain = mo.inner_step(loss, mo.optim.SGD(lr=0.1))
    for scale in (1.0, 2.0):
        helpers.SCALE = scale
        new = compiled(compiled.init(w, lam), lam, batch)
        torch.testing.assert_close(new.w, plain(plain.init(w, lam), lam, batch).w)
    assert compiled.compilation.refused is None
