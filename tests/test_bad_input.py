"""Bad input: a clear error that names the thing and the remedy, never a silently wrong or zero gradient."""

import functools
import warnings

import pytest
import torch

import metaopt as mo

LAM = {"used": torch.tensor(1.0), "idle": torch.tensor(1.0)}
W0 = torch.zeros(2)
STEP = mo.inner_step(lambda w, lam, b: ((w - lam["used"]) ** 2).sum(), mo.optim.SGD(lr=0.1))


def outer(w, lam, b):
    return (w - 3.0).pow(2).sum()


def call(step=STEP, outer_loss=outer, w0=W0, lam=None, batches=(None,) * 2, estimator=None, **rest):
    lam = {"used": torch.tensor(1.0)} if lam is None else lam
    return mo.hypergradient(step, outer_loss, w0, lam, batches, None, estimator=estimator or mo.RMD(), **rest)


def test_an_unused_leaf_is_named_in_a_warning_and_is_zero():
    with pytest.warns(mo.UnusedHyperparameterWarning, match=r"\['idle'\]"):
        hg = call(lam=LAM)
    assert hg.total["idle"].item() == 0.0
    assert hg.total["used"].item() != 0.0


def test_the_warning_comes_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            call(lam=LAM)
    assert len(caught) == 1


def test_lam_that_influences_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"lam at \['idle'\] influences neither.*nothing else is in lam"):
        call(step=mo.inner_step(lambda w, lam, b: (w**2).sum(), mo.optim.SGD(lr=0.1)), lam={"idle": torch.tensor(1.0)})


def test_first_order_says_when_it_is_zero_by_construction():
    with pytest.warns(mo.ZeroHypergradientWarning, match="drops the indirect term"):
        assert call(estimator=mo.FirstOrder()).total["used"].item() == 0.0


@pytest.mark.parametrize(
    ("leaf", "named"),
    [
        (torch.tensor(1), "torch.int64"),
        (0.5, "float"),
        (torch.tensor(True), "torch.bool"),
        (1j * torch.ones(1), "complex"),
    ],
)
def test_lam_must_be_floating_point_tensors(leaf, named):
    with pytest.raises(ValueError, match=rf"lam at \['used'\].*{named}.*floating-point"):
        call(lam={"used": leaf})


def test_empty_lam_and_empty_weights():
    with pytest.raises(ValueError, match=r"lam has no leaves.*FMD has no gradient of initial weights"):
        call(lam={}, estimator=mo.FMD())
    with pytest.raises(ValueError, match="w has no leaves"):
        call(w0={})
    with pytest.raises(ValueError, match=r"weight \['n'\] is a tensor of torch.int64"):
        call(w0={"n": torch.tensor([1])})


def test_mismatched_pytrees_are_named():
    pullback = _pullback()
    with pytest.raises(ValueError, match=r"alpha does not match w.*shape \(3,\) against \(2,\)"):
        pullback(torch.ones(3))
    with pytest.raises(ValueError, match="dtype"):
        pullback(torch.ones(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="different structures"):
        pullback({"w": torch.ones(2)})
    with pytest.raises(ValueError, match=r"lr has the keys .*neither the weights' nor patterns"):
        call(step=mo.inner_step(STEP.inner_loss, mo.optim.SGD(lr={"x": torch.ones(2)})))


def _pullback():
    lam = {"used": torch.tensor(1.0)}
    state = STEP.init(W0, lam)
    estimator = mo.RMD()
    state, carry = estimator.advance(STEP, state, lam, None, estimator.init(STEP, state, lam))
    return estimator.respond(STEP, state, lam, carry)[1]


def test_losses_must_be_scalars_that_depend_on_something():
    with pytest.raises(ValueError, match=r"inner_loss must return a scalar.*shape \(2,\)"):
        call(step=mo.inner_step(lambda w, lam, b: w * lam["used"], mo.optim.SGD(lr=0.1)))
    with pytest.raises(ValueError, match=r"outer_loss must return a scalar.*shape \(2,\)"):
        call(outer_loss=lambda w, lam, b: w)
    with pytest.raises(TypeError, match="inner_loss must return a scalar tensor, got float"):
        call(step=mo.inner_step(lambda w, lam, b: 1.0, mo.optim.SGD(lr=0.1)))
    with pytest.raises(ValueError, match="inner_loss does not depend on the weights"):
        call(step=mo.inner_step(lambda w, lam, b: w.detach().sum() * 0, mo.optim.SGD(lr=0.1)))
    with pytest.raises(ValueError, match="outer_loss depends neither on the weights nor on lam"):
        call(outer_loss=lambda w, lam, b: w.detach().sum())


def test_nan_is_an_error_that_says_where():
    with pytest.raises(
        FloatingPointError, match=r"outer_loss is nan; the weight .* is not finite. The first .* step \d+"
    ):
        call(step=mo.inner_step(lambda w, lam, b: (w * lam["used"] * float("nan")).sum(), mo.optim.SGD(lr=0.1)))
    with pytest.raises(FloatingPointError, match="outer_loss is inf; the weights are finite"):
        call(outer_loss=lambda w, lam, b: w.sum() + float("inf"))
    with pytest.raises(FloatingPointError, match=r"hypergradient is not finite at lam\['used'\] \(its indirect term"):
        call(
            step=mo.inner_step(lambda w, lam, b: (w * lam["used"].sqrt()).sum(), mo.optim.SGD(lr=0.1)),
            lam={"used": torch.tensor(0.0)},
        )


def test_batches_and_horizon():
    with pytest.raises(ValueError, match="batches is empty"):
        call(batches=[])
    with pytest.raises(ValueError, match="horizon must be at least 1, got 0"):
        call(horizon=0)
    with pytest.raises(ValueError, match="only 2 batches in batches"):
        call(horizon=3)
    with pytest.raises(ValueError, match="horizon=T"):
        call(batches=lambda t: None)
    for wrong in (None, 3, "xy", torch.ones(2, 3), {"x": torch.ones(2)}):
        with pytest.raises(TypeError, match="batches gives one batch per inner step: a list, a DataLoader"):
            call(batches=wrong)
    assert call(batches=lambda t: None, horizon=2).total["used"].item() == call().total["used"].item()


def test_batches_as_users_have_them():
    data = torch.utils.data.TensorDataset(torch.arange(6.0))
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    step = mo.inner_step(lambda w, lam, b: ((w - lam["used"] * b[0].sum()) ** 2).sum(), mo.optim.SGD(lr=0.1))
    expected = call(step, batches=list(loader)).total["used"]
    assert call(step, batches=loader).total["used"] == expected
    assert call(step, batches=iter(loader)).total["used"] == expected
    assert call(step, batches=(batch for batch in loader)).total["used"] == expected
    assert call(step, batches=mo.cycle(loader), horizon=3).total["used"] == expected
    lam = {"used": torch.tensor(1.0, requires_grad=True)}
    outer(mo.unroll(step, W0, lam, iter(loader)).w, lam, None).backward()
    assert lam["used"].grad == expected
    twice = call(step, batches=[*loader, *loader]).total["used"]
    assert call(step, batches=mo.cycle(loader), horizon=6).total["used"] == twice
    with pytest.raises(ValueError, match=r"mo\.cycle never ends"):
        call(step, batches=mo.cycle(loader))
    with pytest.raises(ValueError, match="the loader gives no batch"):
        call(step, batches=mo.cycle([]), horizon=3)


def test_batches_functions_are_asked_for_steps_one_to_the_horizon():
    asked = []
    call(batches=lambda t: asked.append(t), horizon=3)
    assert asked == [1, 2, 3]


@pytest.mark.parametrize("gamma", [-0.1, 1.1, float("nan")])
def test_gamma_outside_the_unit_interval(gamma):
    with pytest.raises(ValueError, match=r"gamma must lie in \[0, 1\]"):
        mo.HyperDistill(gamma=gamma)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="steps must be at least 0"):
        mo.TruncatedRMD(-1)
    with pytest.raises(ValueError, match="terms"):
        mo.linsolve.Neumann(-1)
    with pytest.raises(ValueError, match="rate"):
        mo.linsolve.Neumann(1, rate=0.0)
    with pytest.raises(ValueError, match="pi must be"):
        mo.HyperDistill(pi="other")
    with pytest.raises(ValueError, match="nesterov"):
        mo.optim.SGD(lr=0.1, nesterov=True)
    with pytest.raises(TypeError, match=r"mo\.optim\.SGD"):
        mo.inner_step(STEP.inner_loss, torch.optim.SGD([torch.zeros(1)], lr=0.1))


def test_lam_moved_by_hand_under_rmd_is_noticed():
    lam = {"used": torch.tensor(1.0)}
    estimator = mo.RMD()
    state = STEP.init(W0, lam)
    carry = estimator.init(STEP, state, lam)
    state, carry = estimator.advance(STEP, state, lam, None, carry)
    lam["used"].add_(1.0)
    with pytest.raises(RuntimeError, match="lam moved during the run"):
        estimator.advance(STEP, state, lam, None, carry)


def test_neumann_needs_a_rate_where_the_learning_rate_is_no_number():
    step = mo.inner_step(STEP.inner_loss, mo.optim.SGD(lr=lambda lam, t: lam["used"]))
    with pytest.raises(ValueError, match=r"Neumann\(terms, rate="):
        call(step=step, estimator=mo.IFT(mo.linsolve.Neumann(2)))


def test_an_outer_optimiser_that_is_none():
    with pytest.raises(TypeError, match=r"torch\.optim"):
        mo.meta.OuterOptimizer(torch.ones(1), functools.partial(list))
