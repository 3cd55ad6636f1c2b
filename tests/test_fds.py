"""FDS: shared, averaged, bounded forward mode; the bound on its error; and the outer side: sign steps, projections."""

import copy
import math

import pytest
import torch
from cases import PLAIN_OPTIMIZERS, ids
from hypothesis import given
from hypothesis import strategies as st
from problems import close

import metaopt as mo
from metaopt import tree
from metaopt.estimators.cost import Cost, CountedStep
from metaopt.estimators.fds import best_window, shared_window_error
from metaopt.optim.schedules import piecewise

F64 = torch.float64
T = 12
WINDOWS = {"lr": 3, "momentum": T, "weight_decay": T}


def t64(*values):
    return torch.tensor(values, dtype=F64)


class Problem:
    """A tanh regression under SGD with four learning rates, one momentum, one weight decay."""

    def __init__(self):
        g = torch.Generator().manual_seed(4)
        self.w0 = {"a": torch.randn(3, generator=g, dtype=F64), "b": torch.randn(1, generator=g, dtype=F64)}
        self.batches = [
            (torch.randn(6, 3, generator=g, dtype=F64), torch.randn(6, generator=g, dtype=F64)) for _ in range(T)
        ]
        self.outer_batch = (torch.randn(8, 3, generator=g, dtype=F64), torch.randn(8, generator=g, dtype=F64))
        self.lam = {"lr": t64(0.1, 0.3, 0.2, 0.1), "momentum": t64(0.6), "weight_decay": t64(0.01)}
        rules = {name: piecewise(lambda lam, name=name: lam[name], T) for name in self.lam}
        self.step = mo.inner_step(lambda w, lam, batch: self.loss(w, lam, batch), mo.optim.SGD(**rules))

    @staticmethod
    def loss(w, lam, batch):
        return ((batch[0] @ w["a"]).tanh() + w["b"] - batch[1]).pow(2).mean()

    def by(self, estimator, lam=None):
        return mo.hypergradient(
            self.step, self.loss, self.w0, lam or self.lam, self.batches, self.outer_batch, estimator=estimator
        )


# -- the estimator -------------------------------------------------------------------------------
def test_it_is_the_mean_of_the_hypergradients_of_the_steps_that_share():
    """Against exact reverse mode with one hyperparameter of each kind per step."""
    problem = Problem()
    shared = problem.by(mo.FDS(WINDOWS)).total
    single = {name: values.repeat_interleave(T // len(values)) for name, values in problem.lam.items()}
    each_step = problem.by(mo.RMD(), single).total
    expected = {name: each_step[name].reshape(len(problem.lam[name]), -1).mean(1) for name in shared}
    assert close(shared, expected)
    assert all(bool((leaf.abs() > 1e-7).all()) for leaf in shared.values())


def test_one_window_for_all_of_lam_and_the_direct_term():
    problem = Problem()
    loss = problem.loss
    problem.loss = lambda w, lam, batch: loss(w, lam, batch) + 0.0 * w["b"].sum() + (0.3 * lam["lr"].pow(2)).sum()
    exact = problem.by(mo.FMD())
    shared = problem.by(mo.FDS(window=5))
    assert close(shared.total, tree.scale(0.2, exact.total))
    assert close(tree.add(shared.direct, shared.indirect), shared.total)
    assert float(tree.norm(shared.direct)) > 1e-3


def test_columns_of_future_windows_take_no_product():
    problem = Problem()
    products = []
    estimator = mo.FDS(WINDOWS)
    step = CountedStep(problem.step, Cost())
    state = problem.step.init(problem.w0, problem.lam)
    carry = estimator.init(step, state, problem.lam)
    for batch in problem.batches:
        before = step.cost.tangents
        state, carry = estimator.advance(step, state, problem.lam, batch, carry)
        products.append(step.cost.tangents - before)
    others = 2  # momentum and weight decay
    for t, count in enumerate(products):
        assert count <= t // 3 + 1 + others
    assert products == [0, 2, 3, 3, 4, 4, 4, 5, 5, 5, 6, 6]
    assert not carry.Z.w["a"][:4].eq(0).all(1).any()


@pytest.mark.parametrize("case", PLAIN_OPTIMIZERS, ids=ids(PLAIN_OPTIMIZERS))
def test_every_optimiser(case):
    problem = Problem()
    problem.step = mo.inner_step(lambda w, lam, b: problem.loss(w, lam, b) * lam["scale"].exp().sum(), case.make())
    lam = {"scale": t64(0.1)}
    assert close(problem.by(mo.FDS(T), lam).total, tree.scale(1 / T, problem.by(mo.RMD(), lam).total), 1e-10)


def test_the_bound_is_on_every_tangent_of_the_inner_gradient():
    """Scalar quadratic, learned rate: g = h w, so Z' = Z - g - η · clamp(h Z), by hand."""
    h = 3.0
    eta = 0.5
    bound = 0.4
    step = mo.inner_step(lambda w, lam, _: 0.5 * h * w**2, mo.optim.SGD(lr=lambda lam, t: lam))
    w = 1.0
    Z = 0.0
    clipped = []
    for _ in range(5):
        clipped.append(abs(h * Z) > bound)
        Z = Z - h * w - eta * max(-bound, min(bound, h * Z))
        w = w - eta * h * w
    args = (step, lambda w, lam, _: w, torch.tensor(1.0, dtype=F64), torch.tensor(eta, dtype=F64), [None] * 5, None)
    assert mo.hypergradient(*args, estimator=mo.FDS(window=5, bound=bound)).total.item() == pytest.approx(
        Z / 5, rel=1e-12
    )
    assert any(clipped)
    assert close(
        mo.hypergradient(*args, estimator=mo.FDS(window=5, bound=1e6)).total,
        mo.hypergradient(*args, estimator=mo.FMD()).total / 5,
    )


def test_online_and_through_unroll():
    problem = Problem()
    reports = list(
        mo.online(
            problem.step, problem.loss, problem.w0, problem.lam, problem.batches, [problem.outer_batch] * T, estimator=mo.FDS(WINDOWS), optimizer=mo.meta.SignStep,
            project=mo.meta.bounded((0.0, 0.9)), hyper_steps=mo.meta.HyperSteps(every=4),
        )
    )  # fmt: skip
    assert sum(r.hypergradient is not None for r in reports) == 3
    lam = tree.attach(problem.lam)
    loss = problem.loss(
        mo.unroll(problem.step, problem.w0, lam, problem.batches, estimator=mo.FDS(WINDOWS)).w, lam, problem.outer_batch
    )
    assert close(list(torch.autograd.grad(loss, tree.leaves(lam))), tree.leaves(problem.by(mo.FDS(WINDOWS)).total))


def test_bad_settings_are_named():
    problem = Problem()
    with pytest.raises(ValueError, match=r"window is a number of steps of at least 1.*got 0"):
        mo.FDS(window=0)
    with pytest.raises(ValueError, match=r"got 2\.5"):
        mo.FDS(window={"lr": 2.5})
    with pytest.raises(ValueError, match="bound must be positive, got -1"):
        mo.FDS(2, bound=-1.0)
    with pytest.raises(ValueError, match="columns_at_once"):
        mo.FDS(2, columns_at_once=0)
    with pytest.raises(ValueError, match=r"window has leaves.*momentum.*lam"):
        problem.by(mo.FDS({"lr": 3, "momentum": 12}))
    step = mo.custom_step(lambda state, lam, _: mo.InnerState(state.w * lam))
    with pytest.raises(ValueError, match="custom step has no inner gradient"):
        mo.hypergradient(
            step, lambda w, lam, _: w.sum(), t64(1.0), t64(0.5), [None] * 2, None, estimator=mo.FDS(2, bound=1.0)
        )


# -- the bound on its error (2007.07869, theorem) ------------------------------------------------
def mean_square_error(expected, error, samples=40_000):
    """Of the mean of W noisy measurements, against each of the W values that share it; by Monte Carlo."""
    noise = math.sqrt(error) * torch.randn(
        samples, len(expected), generator=torch.Generator().manual_seed(0), dtype=F64
    )
    means = (expected + noise).mean(1, keepdim=True)
    return float((means - expected).pow(2).mean())


@pytest.mark.parametrize(
    ("error", "drift", "window"), [(1.0, 0.1, 5), (1.0, 0.1, 20), (0.5, 0.0, 8), (0.01, 1.0, 4), (2.0, 0.05, 60)]
)
def test_the_bound_holds_with_equality_at_maximal_drift(error, drift, window):
    steps = torch.arange(window, dtype=F64)
    assert mean_square_error(drift * steps, error) == pytest.approx(shared_window_error(error, drift, window), rel=0.01)
    wandering = drift * (2 * torch.rand(window, generator=torch.Generator().manual_seed(1), dtype=F64) - 1).cumsum(0)
    assert mean_square_error(wandering, error) <= 1.01 * shared_window_error(error, drift, window)


@given(error=st.floats(0.1, 100.0), drift=st.floats(0.01, 10.0))
def test_the_best_window_is_the_minimum(error, drift):
    best = best_window(error, drift)
    values = [shared_window_error(error, drift, w) for w in (0.99 * best, best, 1.01 * best)]  # type: ignore[arg-type]
    assert values[1] <= min(values)
    with pytest.raises(ValueError, match="without drift"):
        best_window(error, 0.0)


def test_sharing_does_not_always_help():
    assert shared_window_error(0.01, 1.0, 10) > shared_window_error(0.01, 1.0, 1)
    assert best_window(0.01, 1.0) < 1


# -- the outer side ------------------------------------------------------------------------------
def test_sign_steps_halve_where_the_sign_flips():
    lam = t64(0.0, 0.0, 0.0).requires_grad_()
    optimizer = mo.meta.SignStep([lam], lr=0.1)
    path = []
    for gradient in ([1.0, -5.0, 0.0], [-2.0, -1e-9, 3.0], [1.0, -4.0, 0.0], [1.0, -1.0, -1.0]):
        lam.grad = t64(*gradient)
        optimizer.step()
        path.append(lam.detach().clone())
    expected = [[-0.1, 0.1, 0.0], [-0.05, 0.2, -0.1], [-0.075, 0.3, -0.1], [-0.1, 0.4, -0.05]]
    assert torch.allclose(torch.stack(path), t64(expected))


def test_sign_steps_by_group_in_the_outer_loop_and_after_a_restart():
    lam = {"lr": t64(0.5, 0.5), "wd": t64(0.1)}

    def outer():
        groups = [{"params": [lam["lr"]], "lr": 0.2}, {"params": [lam["wd"]], "lr": 3e-2}]
        return mo.meta.OuterOptimizer(
            lam, mo.meta.SignStep(groups), project=mo.meta.bounded({"lr": (0.0, None), "wd": (0.0, 0.12)})
        )

    one = outer()
    other = outer()
    gradients = [{"lr": t64(1.0, -1.0) * (-1) ** i, "wd": t64(-1.0)} for i in range(6)]
    for g in gradients[:3]:
        one.update(g)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for g in gradients[3:]:
        one.update(g)
        other.update(g)
    assert close(one.lam, other.lam)
    assert close(one.lam["wd"], t64(0.12))  # projected
    assert float((one.lam["lr"] - t64(0.5, 0.5)).abs().max()) <= 0.2
    assert close(lam["lr"], t64(0.5, 0.5))


def test_sign_step_settings_and_a_closure():
    with pytest.raises(ValueError, match="lr must be positive, got 0"):
        mo.meta.SignStep([t64(1.0)], lr=0.0)
    with pytest.raises(ValueError, match=r"shrink must lie in \(0, 1\], got 2"):
        mo.meta.SignStep([t64(1.0)], shrink=2.0)
    x = t64(1.0).requires_grad_()
    optimizer = mo.meta.SignStep([x], lr=0.25)

    def closure():
        optimizer.zero_grad()
        value = x.pow(2).sum()
        value.backward()
        return value

    assert optimizer.step(closure).item() == 1.0
    assert x.item() == 0.75


def test_projections():
    project = mo.meta.bounded({"lr": (0.0, None), "momentum": (0.0, 0.99), "free": (None, None)})
    lam = {"lr": t64(-1.0, 2.0), "momentum": t64(1.5), "free": t64(-7.0)}
    assert close(project(lam), {"lr": t64(0.0, 2.0), "momentum": t64(0.99), "free": t64(-7.0)})
    assert close(project(project(lam)), project(lam))
    assert close(mo.meta.bounded((0.0, 1.0))(lam)["free"], t64(0.0))
    for bad in ({"lr": 0.0}, {"lr": (1.0, 0.0)}, 3.0):
        with pytest.raises(ValueError, match="bounded"):
            mo.meta.bounded(bad)
    with pytest.raises(ValueError, match=r"are not like lam.*momentum"):
        mo.meta.bounded({"lr": (0.0, None)})(lam)
