"""Hyperparameters of an optimiser by their name in λ: paths, transforms, layers, steps, and their errors."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import metaopt as mo
from metaopt import tree

F64 = torch.float64
T = 4
DATA = [torch.randn(5, 3, generator=torch.Generator().manual_seed(t), dtype=F64) for t in range(T)]


def number(value):
    return torch.tensor(value, dtype=F64)


def inner(w, lam, x):
    return ((x @ w["a"]).tanh() @ w["b"] - 1).square().mean()


def outer(w, lam, x):
    return (x @ w["a"]).sin().mean() + w["b"].square().sum()


W0 = {"a": torch.linspace(-1, 1, 6, dtype=F64).reshape(3, 2), "b": torch.linspace(0.2, 0.7, 2, dtype=F64)}


def total(rate, lam, **options):
    step = mo.inner_step(inner, mo.optim.SGD(lr=rate, momentum=0.5, **options))
    return mo.hypergradient(step, outer, W0, lam, DATA, DATA[0]).total


@pytest.mark.parametrize(
    ("named", "written", "lam"),
    [
        (mo.by("lr"), lambda lam, t: lam["lr"], {"lr": number(0.1)}),
        (mo.by("log_lr", torch.exp), lambda lam, t: lam["log_lr"].exp(), {"log_lr": number(-2.0)}),
        (mo.by("rates.head"), lambda lam, t: lam["rates"]["head"], {"rates": {"head": number(0.1)}}),
        (mo.by("rates.0"), lambda lam, t: lam["rates"][0], {"rates": [number(0.1)]}),
        (mo.by("lr", per_step=True), lambda lam, t: lam["lr"][t - 1], {"lr": torch.linspace(0.1, 0.3, T, dtype=F64)}),
        (
            mo.by("lr", mo.optim.unit_interval),
            lambda lam, t: {name: x.sigmoid() for name, x in lam["lr"].items()},
            {"lr": {"a": number(-2.0), "b": number(-3.0)}},
        ),
    ],
    ids=["name", "transform", "nested", "list", "per step", "per weight"],
)
def test_a_name_is_the_function_written_out(named, written, lam):
    expected = total(written, lam)
    got = total(pickle.loads(pickle.dumps(named)), lam)
    for x, y in zip(tree.leaves(got), tree.leaves(expected), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    assert any(float(x.norm()) > 1e-4 for x in tree.leaves(expected))


def test_values_per_layer_are_values_per_weight():
    layers = {"a": number(0.1), "*": number(0.2)}
    weights = {"a": number(0.1), "b": number(0.2)}
    got = total(mo.by("lr"), {"lr": layers})["lr"]
    expected = total(mo.by("lr"), {"lr": weights})["lr"]
    assert list(got) == ["a", "*"]
    assert torch.equal(got["a"], expected["a"])
    assert torch.equal(got["*"], expected["b"])
    assert expected["b"].abs() > 1e-4


def test_over_stacked_tasks_a_rate_is_shared():
    step = mo.inner_step(mo.vmapped(inner), mo.optim.SGD(lr=mo.by("lr")))
    lam = {"lr": number(0.1)}
    stacked = [torch.stack([x, 2 * x]) for x in DATA]
    got = mo.hypergradient(step, mo.vmapped(outer), W0, lam, stacked, stacked[0]).total["lr"]
    single = mo.inner_step(inner, mo.optim.SGD(lr=mo.by("lr")))
    alone = [
        mo.hypergradient(single, outer, W0, lam, [s * x for x in DATA], s * DATA[0]).total["lr"] for s in (1.0, 2.0)
    ]
    torch.testing.assert_close(got, sum(alone), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("rate", "lam", "said"),
    [
        (mo.by("lr"), {"log_lr": number(0.1)}, r"no 'lr' there; it holds \['log_lr'\]"),
        (mo.by("lr.head"), {"lr": number(0.1)}, "it holds a Tensor"),
        (mo.by("lr", per_step=True), {"lr": torch.full((2,), 0.1, dtype=F64)}, "step 3 needs a value, and lam holds 2"),
        (mo.by("lr", per_step=True), {"lr": number(0.1)}, "step 1 needs a value, and lam holds 1"),
        (mo.by("lr"), {"lr": torch.full((5,), 0.1, dtype=F64)}, r"one tensor of shape \(5,\), which does not fit"),
        (mo.by("lr"), {"lr": {"c*": number(0.1)}}, r"no pattern matches the weights \['a', 'b'\]"),
        (mo.by("lr"), {"lr": {"*": number(0.1), "b": number(0.1)}}, r"the patterns \['b'\] match no weight first"),
    ],
)
def test_what_is_missing_is_named(rate, lam, said):
    with pytest.raises((KeyError, IndexError, ValueError), match=said):
        total(rate, lam)


@given(x=st.floats(-5, 5), y=st.floats(-5, 5))
def test_parametrisations_have_inverses(x, y):
    free = torch.tensor([x, y], dtype=F64)
    for of in (mo.optim.positive, mo.optim.unit_interval, mo.optim.Interval(-1.0, 3.0)):
        torch.testing.assert_close(of.inverse(of(free)), free, rtol=1e-9, atol=1e-9)
    shares = mo.optim.simplex(free)
    torch.testing.assert_close(mo.optim.simplex(mo.optim.simplex.inverse(shares)), shares, rtol=1e-12, atol=1e-12)
    assert pickle.loads(pickle.dumps(mo.optim.positive)) == mo.optim.positive


@pytest.mark.parametrize(
    ("of", "value"),
    [
        (mo.optim.positive, [0.0]),
        (mo.optim.unit_interval, [1.0]),
        (mo.optim.Interval(1.0, 2.0), [0.5]),
        (mo.optim.simplex, [0.5, 0.6]),
    ],
)
def test_values_outside_have_no_inverse(of, value):
    with pytest.raises(ValueError, match="the inverse is of"):
        of.inverse(torch.tensor(value))
    with pytest.raises(ValueError, match="low must be below high"):
        mo.optim.Interval(2.0, 1.0)
