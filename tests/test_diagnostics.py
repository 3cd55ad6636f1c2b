"""Diagnostics against numbers worked out by hand on problems that allow it."""

import io
import itertools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import metaopt as mo
from metaopt import tree
from metaopt.diagnose import results
from metaopt.diagnose.smoothness import agreement
from metaopt.verify import case, cases, reference
from metaopt.verify.memory import peak_bytes

F64 = torch.float64


def scalar(value):
    return torch.tensor(value, dtype=F64)


# -- along a trajectory --------------------------------------------------------------------------
@pytest.mark.parametrize("make", cases.CLOSED_FORMS, ids=lambda make: make.__name__)
def test_exact_methods_have_cosine_one_and_the_exact_norm(make):
    problem = make(horizon=4)
    found = mo.diagnose.alignment([mo.RMD(mo.trajectory.Checkpointed(slots=2)), mo.TruncatedRMD(4)], problem)
    for point in found.points:
        assert point.total.cosine == pytest.approx(1, abs=1e-9)
        assert point.total.relative_error < 1e-10
    for t, (size, _) in found.exact_norms.items():
        assert size == pytest.approx(float(reference.vector(problem.exact(t)).norm()), rel=1e-10)


def test_first_order_has_an_indirect_term_of_zero():
    problem = cases.log_l2(horizon=3)
    (point,) = mo.diagnose.alignment(mo.FirstOrder(), problem, at=[3]).points
    exact = problem.exact(3)
    direct = 0.3 * problem.lam
    assert point.total.cosine == pytest.approx(float(torch.nn.functional.cosine_similarity(direct, exact, dim=0)))
    assert point.total.norm_ratio == pytest.approx(float(direct.norm() / exact.norm()))
    assert point.total.relative_error == pytest.approx(float((direct - exact).norm() / exact.norm()))
    assert math.isnan(point.indirect.cosine)
    assert point.indirect.norm_ratio == 0
    assert point.indirect.relative_error == pytest.approx(1)


def test_distillation_is_exact_where_the_contraction_is_isotropic():
    problem = cases.isotropic(horizon=5)
    found = mo.diagnose.alignment(mo.HyperDistill(gamma=problem.contraction), problem)
    assert max(point.total.relative_error for point in found.points) < 1e-10
    assert found.curve("HyperDistill(gamma=0.88)", value="norm_ratio")[0] == [1, 2, 3, 4, 5]


def test_an_estimator_that_answers_several_times_in_a_run_answers_as_in_a_run_of_its_own():
    problem = cases.log_l2(horizon=5)
    for estimator in (
        mo.HyperDistill(gamma=0.9),
        mo.TruncatedRMD(2),
        mo.DrMAD(),
        mo.IFT(converged=None),
        mo.SOBA(rate=0.1),
    ):
        for got in mo.diagnose.alignment(estimator, problem, at=[2, 5]).points:
            hg = mo.hypergradient(
                problem.step,
                problem.outer_loss,
                problem.w0,
                problem.lam,
                problem.batches[: got.t],
                None,
                estimator=estimator,
            )
            want = reference.vector(problem.exact(got.t))
            assert got.total.relative_error == pytest.approx(
                float((reference.vector(hg.total) - want).norm() / want.norm()), rel=1e-8
            )


def test_random_draws_are_the_same_for_everyone():
    module = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1)).double().train()
    model = mo.functional(module)
    x = torch.randn(6, 3, dtype=F64)
    step = mo.inner_step(
        lambda w, lam, b: lam.exp() * model(w, x).square().mean() - model(w, x).mean(), mo.optim.SGD(lr=0.1)
    )
    problem = mo.Problem(
        step, lambda w, lam, b: w["2.weight"].square().sum(), model.params, scalar(0.3), [None] * 4, name="dropout"
    )
    before = torch.get_rng_state()
    found = mo.diagnose.alignment({"one": mo.RMD(mo.trajectory.Checkpointed(slots=1))}, problem, at=[1, 4])
    assert torch.equal(torch.get_rng_state(), before)
    assert max(point.total.relative_error for point in found.points) < 1e-10


def test_horizons_out_of_reach_are_an_error():
    with pytest.raises(ValueError, match=r"from 1 to 3 .* got \[4\]"):
        mo.diagnose.alignment(mo.RMD(), cases.quadratic(horizon=3), at=[4])


# -- bias: the noisy quadratic of Wu et al. ------------------------------------------------------
H = 0.8
LR = 0.3
SIGMA = 0.7
W0 = 1.5


def noisy_quadratic(T):
    """``½h(w - c_t)²`` with ``c_t = ±σ``, λ the learning rate, outer loss ``½h(w² + σ²)``: draw number i spells the signs."""
    step = mo.inner_step(lambda w, lam, c: 0.5 * H * (w - c) ** 2, mo.optim.SGD(lr=lambda lam, t: lam))

    def sample(i):
        batches = [scalar(SIGMA if i >> t & 1 else -SIGMA) for t in range(T)]
        return mo.Problem(
            step, lambda w, lam, _: 0.5 * H * (w**2 + SIGMA**2), scalar(W0), scalar(LR), batches, name="noisy quadratic"
        )

    return sample


@pytest.mark.parametrize("T", [1, 2, 4])
def test_bias_of_one_step_on_the_noisy_quadratic(T):
    found = mo.diagnose.bias([mo.OneStep()], noisy_quadratic(T), 2**T)  # every draw once: the exact expectation
    exact, short = found.estimates
    r = 1 - LR * H
    lr = torch.tensor(LR, dtype=F64, requires_grad=True)
    keep = (1 - lr * H) ** 2
    second = keep**T * W0**2 + sum(keep**t for t in range(T)) * (lr * H * SIGMA) ** 2  # E w_T²
    (truth,) = torch.autograd.grad(0.5 * H * second, lr)
    before = r ** (2 * T - 2) * W0**2 + sum(r ** (2 * t) for t in range(T - 1)) * (LR * H * SIGMA) ** 2  # E w_{T-1}²
    one_step = H**2 * (LR * H * SIGMA**2 - r * before)
    assert found.exact_norm == pytest.approx(abs(float(truth)), rel=1e-10)
    assert short.bias * found.exact_norm == pytest.approx(abs(one_step - float(truth)), abs=1e-10)
    assert exact.bias == exact.standard_error == 0
    assert short.rmse == pytest.approx(math.hypot(short.bias, short.deviation))
    assert (T == 1) == (short.bias < 1e-10)


def test_variance_of_one_step_on_the_noisy_quadratic():
    _, row = (found := mo.diagnose.bias(mo.OneStep(), noisy_quadratic(1), 2)).estimates
    values = [H * ((1 - LR * H) * W0 + LR * H * c) * -H * (W0 - c) for c in (-SIGMA, SIGMA)]
    assert row.deviation * found.exact_norm == pytest.approx(abs(values[0] - values[1]) / 2, rel=1e-10)


def test_standard_error_of_the_bias():
    draws = [0, 3, 5, 6, 9]
    found = mo.diagnose.bias(mo.OneStep(), (sample := noisy_quadratic(4)), draws)
    differences = []
    for i in draws:
        p = sample(i)
        one, all_ = (
            mo.hypergradient(p.step, p.outer_loss, p.w0, p.lam, p.batches, None, estimator=e).total
            for e in (mo.OneStep(), mo.RMD())
        )
        differences.append(float(one - all_))
    spread = torch.tensor(differences).std() / math.sqrt(len(draws))
    assert found.estimates[1].standard_error * found.exact_norm == pytest.approx(float(spread), rel=1e-5)


def test_bias_needs_draws():
    with pytest.raises(ValueError, match="at least two draws, got 1"):
        mo.diagnose.bias(mo.OneStep(), noisy_quadratic(2), 1)


# -- vanishing and exploding ---------------------------------------------------------------------
@given(a=st.floats(0.3, 1.6), T=st.integers(2, 7))
def test_the_rate_of_a_linear_recursion(a, T):
    step = mo.custom_step(lambda state, lam, b: state._replace(w=a * state.w + lam))
    problem = mo.Problem(step, lambda w, lam, b: 3 * w, scalar(1.0), scalar(0.5), [None] * T, name="linear")
    found = mo.diagnose.norms(problem)
    assert found.rate == pytest.approx(a, rel=1e-9)
    for k, lag in enumerate(found.lags):
        assert lag.cotangent == pytest.approx(3 * a**k)
        assert lag.contribution == pytest.approx(3 * a**k)
        assert lag.partial == pytest.approx(3 * sum(a**i for i in range(k + 1)))
        assert lag.cosine == pytest.approx(1)
    assert found.horizon_for() == 1


def test_the_horizon_needed_is_where_a_truncation_points_the_right_way():
    def shift(state, lam, batch):  # λ_0 enters only in the first step, λ_1 only in the last one
        return state._replace(w=state.w + batch * lam)

    batches = [torch.tensor(b, dtype=F64) for b in ([1.0, 0.0], [0.0, 0.0], [0.0, 1.0])]
    problem = mo.Problem(
        mo.custom_step(shift),
        lambda w, lam, b: w.sum(),
        torch.zeros(2, dtype=F64),
        torch.ones(2, dtype=F64),
        batches,
        name="two",
    )
    found = mo.diagnose.norms(problem)
    assert [round(lag.cosine, 6) for lag in found.lags] == [round(2**-0.5, 6)] * 2 + [1]
    assert found.horizon_for() == 3
    assert found.horizon_for(0.7) == 1


def test_momentum_counts_among_the_cotangent():
    plain = mo.diagnose.norms(cases.quadratic(horizon=4))
    heavy = mo.diagnose.norms(cases.momentum(horizon=4))
    assert plain.lags[0].cotangent != plain.lags[1].cotangent
    problem = cases.momentum(horizon=2, size=1, conditioning=1.0)
    lags = mo.diagnose.norms(problem).lags
    alpha = float((reference.states(problem, 2)[-1].w - case.draw_quadratic(1, 1.0, 0).target).abs())
    assert lags[1].cotangent == pytest.approx(alpha * math.hypot(1 - 0.3, 0.3 * 0.7))  # (1 - ηh, -ημ)
    assert heavy.rate != plain.rate


# -- metasmoothness ------------------------------------------------------------------------------
@given(seed=st.integers(0, 100))
def test_training_that_is_affine_in_lam_is_perfectly_smooth(seed):
    found = mo.diagnose.smoothness(cases.quadratic(seed=seed), h=0.1, directions=2, seed=seed)
    assert found.mean == pytest.approx(1)
    exact = cases.quadratic(seed=seed).exact(6)
    assert all(row.metasmoothness == pytest.approx(1) for row in found.directions)
    assert all(abs(row.first) <= float(exact.norm()) + 0.1 for row in found.directions)  # a slope, up to curvature


def test_metasmoothness_of_parabolas():
    def parabolas(state, lam, batch):  # at λ = 0 with h = 1: (0, 1, 4), (0, 1, -1), (9, 4, 1)
        return state._replace(w=torch.stack([lam**2, -1.5 * lam**2 + 2.5 * lam, (lam - 3) ** 2]))

    problem = mo.Problem(
        mo.custom_step(parabolas),
        lambda w, lam, b: w[0],
        torch.zeros(3, dtype=F64),
        scalar(0.0),
        [None],
        name="parabolas",
    )
    (row,) = mo.diagnose.smoothness(problem, h=1.0, directions=[scalar(1.0)]).directions
    assert row.metasmoothness == pytest.approx((4 - 1 + 8) / 13)
    assert (row.first, row.second) == (1.0, 3.0)


def test_a_response_that_turns_round_is_not_smooth_and_none_is_undefined():
    assert agreement(scalar([0.0]), scalar([2.0]), scalar([1.0])) == -1
    assert math.isnan(agreement(scalar([1.0]), scalar([1.0]), scalar([1.0])))


# -- cost ----------------------------------------------------------------------------------------
def test_cost_is_counted():
    found = mo.diagnose.costs([mo.RMD(), mo.OneStep(), mo.FirstOrder()], cases.log_l2(horizon=4), repeats=1)
    by_name = {expense.estimator: expense for expense in found.expenses}
    assert (by_name["RMD"].gradients, by_name["RMD"].work.products) == (8, 8)
    assert (by_name["OneStep"].gradients, by_name["OneStep"].work.products) == (4, 1)
    assert (by_name["FirstOrder"].gradients, by_name["FirstOrder"].work.products) == (4, 0)
    assert all(expense.seconds > 0 and expense.peak_bytes > 0 for expense in found.expenses)


def test_peak_memory_of_known_allocations():
    x = torch.ones(1000)

    def work():
        a = x + 1
        b = a * 2  # two at once
        del a
        return (b.view(10, 100) + 1).sum()  # b, a copy, the sum; the view is no memory

    assert peak_bytes(work) == 8004
    assert peak_bytes(lambda: x.view(10, 100)[0]) == 0

    def backward():
        y = x.detach().requires_grad_()
        return torch.autograd.grad(y.exp().sum(), y)[
            0
        ]  # exp's result, ones of the sum (expanded: 4 bytes), the loss, the gradient

    assert 8000 <= peak_bytes(backward) <= 8100


def test_peak_memory_of_full_trajectories_grows_by_one_state_per_step():
    def peak(T):
        step = mo.inner_step(lambda w, lam, b: 0.5 * (lam * w * w).sum(), mo.optim.SGD(lr=0.1))
        problem = mo.Problem(
            step, lambda w, lam, b: w.sum(), torch.ones(1000, dtype=F64), scalar(0.5), [None] * T, name="big"
        )
        return mo.diagnose.costs(mo.RMD(), problem, repeats=0).expenses[0].peak_bytes

    assert peak(30) - peak(20) == pytest.approx(10 * 8000, rel=0.01)  # and the losses


# -- together ------------------------------------------------------------------------------------
def test_compare_gives_a_table_a_picture_and_a_dict(tmp_path):
    found = mo.diagnose.compare(
        [mo.OneStep(), mo.FirstOrder()], noisy_quadratic(3)(0), sample=noisy_quadratic(3), draws=2
    )
    assert list(found.parts) == ["alignment", "costs", "norms", "smoothness", "bias"]
    plain = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert plain["alignment"]["rows"][2]["estimator"] == "OneStep"
    assert plain["alignment"]["rows"][0]["cosine"] == pytest.approx(1)
    found.figure().savefig(tmp_path / "all.png")
    for part in found.parts.values():
        part.figure().savefig(tmp_path / "one.png")
        assert len(part.table().rows) == len(part.rows())
        assert "<table>" in part._repr_html_()
    assert "OneStep" in str(found)
    console = Console(file=io.StringIO(), width=150)
    for table in found.tables():
        console.print(table.rich())
    assert "OneStep" in console.file.getvalue()


def test_stacked_problems_are_the_sum_of_their_tasks():
    targets = torch.randn(3, 2, dtype=F64)
    loss = lambda w, lam, y: (lam * (w - y) ** 2).sum()  # noqa: E731
    step = mo.inner_step(mo.vmapped(loss), mo.optim.SGD(lr=0.1))
    outer = mo.vmapped(lambda w, lam, y: (w**2).sum())
    lam = torch.ones(2, dtype=F64)
    problem = mo.Problem(
        step, outer, mo.replicated(torch.zeros(2, dtype=F64), 3), lam, [targets] * 4, targets, name="stack"
    )
    found = mo.diagnose.alignment(mo.OneStep(), problem, at=[4])
    one = mo.inner_step(loss, mo.optim.SGD(lr=0.1))
    total = sum(
        mo.hypergradient(
            one, lambda w, lam, y: (w**2).sum(), torch.zeros(2, dtype=F64), lam, [y] * 4, None, estimator=mo.RMD()
        ).total
        for y in targets
    )
    assert found.exact_norms[4][0] == pytest.approx(float(tree.norm(total)))


def test_calibration_fits_the_size():
    problem = cases.isotropic(horizon=4)
    fitted = mo.diagnose.calibrated(
        {"ours": mo.HyperDistill(gamma=problem.contraction, theta=7.0), "fo": mo.FirstOrder()}, problem
    )
    assert fitted["ours"].theta == pytest.approx(1)
    assert fitted["fo"] == mo.FirstOrder()


def test_names():
    assert list(results.named(mo.TruncatedRMD(2))) == [repr(mo.TruncatedRMD(2))]
    with pytest.raises(ValueError, match="same settings"):
        results.named([mo.RMD(), mo.RMD()])
    with pytest.raises(ValueError, match="no estimator"):
        results.named([])
    assert list(itertools.islice(results.named({"mine": mo.RMD()}), 1)) == ["mine"]


# -- before a run --------------------------------------------------------------------------------
def small(loss, horizon=40):
    torch.manual_seed(0)
    model = mo.functional(torch.nn.Linear(3, 2).double())
    step = mo.inner_step(lambda w, lam, b: loss(model, w, lam, b), mo.optim.SGD(lr=0.1, momentum=0.9))
    x = torch.randn(6, 3, dtype=F64)
    outer = lambda w, lam, b: model(w, b).square().mean() + w["bias"].sum()  # noqa: E731
    return mo.Problem(step, outer, model.params, torch.tensor([0.5, 0.2], dtype=F64), [x] * horizon, x)


def look(found, what):
    (one,) = [look for look in found.looks if look.what.startswith(what)]
    return one


def test_preflight_of_a_healthy_problem():
    found = mo.diagnose.preflight(small(lambda model, w, lam, b: (model(w, b) * lam).square().mean()))
    assert found.good, found
    assert [f.trajectory for f in found.forecasts] == ["Full", "Graphs", "Checkpointed(17)"]
    assert [f.seconds > 0 for f in found.forecasts] == [True] * 3
    assert "nothing to mend" in repr(found)


def test_forecast_bytes_are_those_of_the_whole_run():
    problem = small(lambda model, w, lam, b: (model(w, b) * lam).square().mean())
    found = mo.diagnose.preflight(problem).forecasts
    for forecast, trajectory in zip(found[:2], (mo.trajectory.Full(), mo.trajectory.Graphs()), strict=True):
        actual = mo.diagnose.costs(mo.RMD(trajectory), problem, repeats=0).expenses[0].peak_bytes
        assert forecast.bytes == pytest.approx(actual, rel=0.2), forecast


def test_preflight_names_what_is_wrong():
    count = [0]

    def counting(model, w, lam, b):
        count[0] += 1
        return (model(w, b) * lam).square().mean() * (1 + 0.1 * count[0])

    found = mo.diagnose.preflight(small(counting))
    assert not look(found, "a replay is the same").good
    headless = mo.diagnose.preflight(small(lambda model, w, lam, b: (w["weight"] @ b.T * lam[0]).square().mean()))
    assert "bias" in look(headless, "every weight").found
    once = mo.diagnose.preflight(
        small(lambda model, w, lam, b: torch.cdist(model(w, b), b[:, :2] * lam).square().mean())
    )
    assert not look(once, "exact reverse mode").good
    assert "no second derivative" in look(once, "exact reverse mode").found
