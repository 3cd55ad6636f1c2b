"""Progress bars and histories over both loops, and test-time evaluation of tasks."""

import json
import math

import pytest
import torch
from torch.nn.functional import cross_entropy, mse_loss

import metaopt as mo
from metaopt.models import MAML, MetaWeightNet, SaturatedWarning, batch_mean

F64 = torch.float64


def adam(params):
    return torch.optim.Adam(params, lr=0.1)


def problem(horizon=4):
    step = mo.inner_step(
        lambda w, lam, x: lam["a"].exp() * (w - x).square().sum(), mo.optim.SGD(lr=mo.by("rates.lr", mo.optim.positive))
    )
    lam = {"a": torch.tensor(0.0, dtype=F64), "rates": {"lr": torch.full((2,), -3.0, dtype=F64)}}
    data = [torch.full((2,), 1.0 + t, dtype=F64) for t in range(horizon)]
    w0 = torch.zeros(2, dtype=F64)
    return mo.Problem(step, lambda w, lam, x: (w - x).square().sum(), w0, lam, data, data[0])


LOOPS = {
    "tune": lambda p, **options: p.tune(optimizer=adam, runs=4, **options),
    "online": lambda p, **options: p.online(mo.OneStep(), optimizer=adam, **options),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_a_history_holds_what_the_reports_said(loop, tmp_path, capsys):
    history = mo.History()
    reports = list(mo.progress(LOOPS[loop](problem()), history))
    assert [report.number for report in reports] == [1, 2, 3, 4]
    assert history["outer loss"] == [float(report.outer_loss) for report in reports]
    assert history["a"] == [float(report.lam["a"]) for report in reports]
    assert history["|rates.lr|"] == [float(report.lam["rates"]["lr"].norm()) for report in reports]
    norms = [float(report.hypergradient.total["rates"]["lr"].norm()) for report in reports]
    assert history["|dL/d rates.lr|"] == norms
    assert min(norms) > 0
    bar = capsys.readouterr().err
    assert "4/4" in bar
    assert f"outer loss {history['outer loss'][-1]:.4g}" in bar

    history.save(tmp_path / "history.json")
    assert mo.History.load(tmp_path / "history.json").rows == history.rows
    history.figure().savefig(tmp_path / "history.png")
    assert "rates.lr" in repr(history)
    assert "<table>" in history._repr_html_()
    with pytest.raises(KeyError, match="no column 'b'; there are"):
        history["b"]


@pytest.mark.parametrize("loop", LOOPS)
def test_a_bar_goes_on_where_the_loop_does(loop, tmp_path, capsys):
    path = tmp_path / "loop.pt"
    for report in LOOPS[loop](problem(), checkpoint=path, **({"checkpoint_every": 1} if loop == "online" else {})):
        if report.number == 2:
            break
    assert [
        r.number
        for r in mo.progress(
            LOOPS[loop](problem(), checkpoint=path, **({"checkpoint_every": 1} if loop == "online" else {}))
        )
    ] == [3, 4]
    assert "4/4" in capsys.readouterr().err


def test_rows_that_come_again_are_replaced():
    def add(history, *numbers):
        for number in numbers:
            report = next(iter(problem().tune(optimizer=adam, runs=1)))
            history.add(report._replace(number=number))

    history = mo.History()
    add(history, 1, 2, 3, 4, 3, 4, 5)
    assert history["number"] == [1, 2, 3, 4, 5]
    add(history, 1, 2)
    assert history["number"] == [1, 2, 3, 4, 5, 1, 2]


def test_steps_without_an_update_are_undefined_there():
    history = mo.History()
    for report in problem().online(mo.OneStep(), optimizer=adam, hyper_steps=mo.meta.HyperSteps(every=2)):
        history.add(report)
    assert [math.isnan(value) for value in history["outer loss"]] == [True, False, True, False]
    assert [math.isnan(value) for value in history["|dL/d a|"]] == [True, False, True, False]


@pytest.mark.parametrize("content", ["", "{}", json.dumps({"metaopt history": 2, "rows": []}), "[1]"])
def test_another_file_is_no_history(content, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"other\.json is"):
        mo.History.load(path)


# -- test time ------------------------------------------------------------------------------------
def tasks(sizes):
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 3, generator=g, dtype=F64), torch.randn(n, 2, generator=g, dtype=F64)) for n in sizes]


@pytest.mark.parametrize("over", [mo.vmapped, mo.looped])
@pytest.mark.parametrize("weights", ["*", ["bias"]])
def test_evaluation_is_the_loop_over_tasks(over, weights):
    maml = MAML.of(torch.nn.Linear(3, 2).double(), mse_loss, weights=weights)
    w, phi = maml.init()
    rows = tasks([4, 4, 4])
    train = tuple(torch.stack(part) for part in zip(*rows, strict=True))
    test = tuple(part.flip(1) + 1 for part in train)
    step = maml.step(mo.optim.SGD(lr=0.1, momentum=0.9), over=over)
    found = mo.evaluate(step, maml.outer_loss, w, phi, [train] * 3, test)

    alone = mo.inner_step(maml.inner_loss, mo.optim.SGD(lr=0.1, momentum=0.9))
    expected = []
    for i in range(3):
        task = tuple(part[i] for part in train)
        expected.append(mo.evaluate(alone, maml.outer_loss, w, phi, [task] * 3, tuple(part[i] for part in test)))
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)
    assert not found.requires_grad
    adapted = maml.adapted({name: x + 1 for name, x in w.items()}, phi)
    moved = [name for name in phi if not torch.equal(adapted[name], phi[name])]
    assert moved == (["weight", "bias"] if weights == "*" else ["bias"])


def test_evaluation_of_tasks_of_unequal_size():
    maml = MAML.of(torch.nn.Linear(3, 2).double(), mse_loss)
    w, phi = maml.init()
    ragged = mo.meta.Ragged(tuple(tasks([2, 5, 3])))
    found = mo.evaluate(maml.step(mo.optim.SGD(lr=0.1), over=mo.looped), maml.outer_loss, w, phi, [ragged], ragged)
    alone = mo.inner_step(maml.inner_loss, mo.optim.SGD(lr=0.1))
    expected = [mo.evaluate(alone, maml.outer_loss, w, phi, [task], task) for task in ragged.batches]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_the_objective_is_the_mean_over_tasks_and_the_inner_loss_their_sum():
    maml = MAML.of(torch.nn.Linear(3, 2).double(), mse_loss)
    w, phi = maml.init()
    batch = tuple(torch.stack(part) for part in zip(*tasks([4, 4]), strict=True))
    stacked = mo.replicated(w, 2).w
    objective = maml.objective()(stacked, phi, batch)
    inner = maml.step(mo.optim.SGD(lr=0.1)).loss(stacked, phi, batch)
    torch.testing.assert_close(inner, 2 * objective, rtol=1e-12, atol=1e-12)


def test_a_saturated_weight_net_is_spoken_of():
    net = torch.nn.Linear(4, 3).double()
    loss = lambda prediction, y: cross_entropy(prediction, y, reduction="none")  # noqa: E731
    batch = (torch.randn(5, 4, dtype=F64), torch.arange(5) % 3)
    for shift, said in ((30.0, r"are 1\.00"), (-30.0, r"are 0\.00")):
        model = MetaWeightNet.of(net, loss, coefficients=batch_mean)
        w, lam = model.init()
        with pytest.warns(SaturatedWarning, match=said):
            model.inner_loss(w, {**lam, "2.bias": lam["2.bias"] + shift}, batch)
    model.inner_loss(w, lam, batch)  # warnings are errors here: an ordinary net says nothing
