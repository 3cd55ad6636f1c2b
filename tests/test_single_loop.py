"""Methods from first derivatives: DARTS, SAMA (finite differences), SOBA (one loop), F2SA and BOME (penalty)."""

import itertools

import pytest
import torch
from cases import PLAIN_OPTIMIZERS, ids
from test_stochastic import F64, flat, gradient, small_problem, t64

import metaopt as mo
from metaopt.estimators.outer import outer_gradient

FIRST_DERIVATIVES = [mo.DARTS(), mo.SAMA(), mo.SOBA(rate=0.05), mo.F2SA(rate=0.05), mo.BOME(rate=0.05)]


@pytest.mark.parametrize("case", PLAIN_OPTIMIZERS, ids=ids(PLAIN_OPTIMIZERS))
def test_darts_is_one_step_to_second_order(case):
    problem = small_problem(case.make())
    one_step = flat(gradient(problem, mo.OneStep()).indirect)
    errors = [float((flat(gradient(problem, mo.DARTS(radius=r)).indirect) - one_step).norm()) for r in (0.1, 0.01)]
    assert errors[0] > 1e-9
    assert errors[1] < 0.02 * errors[0]


def test_darts_learns_learning_rates():
    lr = mo.optim.SGD(lr=lambda lam, t: lam["lr"], momentum=0.9)
    step = mo.inner_step(lambda w, lam, _: 0.5 * ((w - lam["target"]) ** 2).sum(), lr)
    args = (
        step,
        lambda w, lam, _: (w**2).sum(),
        t64(1.0, 2.0),
        {"lr": t64(0.1), "target": t64(0.5, 0.2)},
        [None] * 3,
        None,
    )
    torch.testing.assert_close(
        flat(mo.hypergradient(*args, estimator=mo.DARTS()).total),
        flat(mo.hypergradient(*args, estimator=mo.OneStep()).total),
    )
    with pytest.warns(mo.UnusedHyperparameterWarning, match="lr"):
        mo.hypergradient(*args, estimator=mo.SAMA())


@pytest.mark.parametrize("case", PLAIN_OPTIMIZERS, ids=ids(PLAIN_OPTIMIZERS))
def test_sama_formula(case):
    problem = small_problem(case.make())
    hg = gradient(problem, mo.SAMA(radius=1e-4))
    _, alpha, _ = outer_gradient(problem.outer, hg.state.w, problem.lam, None)
    w = mo.tree.attach(hg.state.w)
    lam = mo.tree.attach(problem.lam)
    loss = problem.step.loss(w, lam, problem.batches[-1])
    g = dict(zip(w, torch.autograd.grad(loss, list(w.values()), create_graph=True), strict=True))
    g_leaf = mo.tree.attach(g)
    update, _ = case.make().update(g_leaf, hg.state.w, hg.state.slots, problem.lam, hg.state.t + 1)
    v = torch.autograd.grad([-u for u in update.values()], list(g_leaf.values()), list(alpha.values()))
    mixed = torch.autograd.grad(list(g.values()), list(lam.values()), v)
    torch.testing.assert_close(flat(hg.indirect), -torch.cat(mixed), rtol=1e-5, atol=1e-9)


def test_soba_recursion():
    """By hand on a quadratic with H = diag(h): v follows -(1/h) ∂L_val/∂w."""
    h = t64(0.5, 2.0)
    lam = t64(1.0, -1.0)
    w = t64(3.0, 1.0)
    rate = 0.2
    lr = 0.3
    step = mo.inner_step(lambda w, lam, _: 0.5 * (h * (w - lam) ** 2).sum(), mo.optim.SGD(lr=lr))
    v = torch.zeros(2, dtype=F64)
    w_t = w
    for _ in range(5):
        w_t = w_t - lr * h * (w_t - lam)
        v = v - rate * (h * v + 2 * w_t)
    hg = mo.hypergradient(step, lambda w, lam, _: (w**2).sum(), w, lam, [None] * 5, None, estimator=mo.SOBA(rate=rate))
    torch.testing.assert_close(hg.total, -h * v, rtol=1e-12, atol=0)


def ridge():
    """Learnable log-L2: ``w* = (XᵀX + e^λ I)^{-1} Xᵀy``."""
    g = torch.Generator().manual_seed(4)
    X = torch.randn(12, 3, generator=g, dtype=F64) / 12**0.5
    y = torch.randn(12, generator=g, dtype=F64) / 12**0.5
    Xv = torch.randn(8, 3, generator=g, dtype=F64)
    yv = torch.randn(8, generator=g, dtype=F64)
    step = mo.inner_step(
        lambda w, lam, _: 0.5 * (X @ w - y).pow(2).sum() + 0.5 * lam.exp() * (w**2).sum(), mo.optim.SGD(lr=0.3)
    )

    def outer(w, lam, _):
        return 0.5 * (Xv @ w - yv).pow(2).mean()

    lam = torch.tensor(-1.0, dtype=F64, requires_grad=True)
    solution = torch.linalg.solve(X.T @ X + lam.exp() * torch.eye(3, dtype=F64), X.T @ y)
    (exact,) = torch.autograd.grad(outer(solution, lam, None), lam)
    return (step, outer, torch.zeros(3, dtype=F64), lam.detach(), [None] * 150, None), exact


def test_ridge_soba_is_exact_at_convergence():
    args, exact = ridge()
    torch.testing.assert_close(mo.hypergradient(*args, estimator=mo.SOBA(rate=0.3)).total, exact, rtol=1e-8, atol=0)


def test_ridge_f2sa_error_vanishes_with_the_multiplier():
    args, exact = ridge()
    errors = [
        abs(float(mo.hypergradient(*args, estimator=mo.F2SA(rate=0.3, multiplier=m)).total - exact))
        for m in (1e1, 1e2, 1e3, 1e4)
    ]
    assert errors[0] > 1e-6
    for previous, error in itertools.pairwise(errors):
        assert 0.05 < error / previous < 0.2  # O(1/κ)


def test_bome_sees_stacked_tasks_as_one_problem():
    def inner(w, lam, x):
        return ((w - lam) * x).pow(2).sum() + w.pow(4).sum()

    def outer(w, lam, x):
        return (w - x).pow(2).sum() + lam.pow(2).sum()

    w = t64([1.0, 2.0], [0.5, -1.0])
    lam = t64(0.3, -0.2)
    x = t64([1.0, 0.5], [2.0, -1.0])
    sgd = mo.optim.SGD(lr=0.02)
    stacked = mo.hypergradient(
        mo.inner_step(mo.vmapped(inner), sgd),
        mo.vmapped(outer),
        mo.Stacked(w),
        lam,
        [x] * 4,
        x,
        estimator=mo.BOME(rate=0.02),
    )
    as_one = mo.hypergradient(
        mo.inner_step(lambda w, lam, x: sum(inner(w[i], lam, x[i]) for i in range(2)), sgd),
        lambda w, lam, x: sum(outer(w[i], lam, x[i]) for i in range(2)),
        w, lam, [x] * 4, x, estimator=mo.BOME(rate=0.02),
    )  # fmt: skip
    torch.testing.assert_close(stacked.total, as_one.total, rtol=1e-12, atol=0)
    assert stacked.info.multiplier > 0


def test_bome_solves_a_bilevel_problem_up_to_its_rate():
    """``w*(λ) = Aλ``, and ``min |Aλ - b|²/2 + |λ|²/20``: the solution is that of a ridge regression."""
    A = t64([1.0, 0.5], [0.0, 1.0], [0.3, -0.4])
    b = t64(1.0, -2.0, 0.5)
    h = t64(1.0, 2.0, 1.5)
    step = mo.inner_step(lambda w, lam, _: 0.5 * (h * (w - A @ lam) ** 2).sum(), mo.optim.SGD(lr=0.5))

    def outer(w, lam, _):
        return 0.5 * ((w - b) ** 2).sum() + 0.05 * (lam**2).sum()

    def run(rate):
        args = (
            step,
            outer,
            torch.zeros(3, dtype=F64),
            torch.zeros(2, dtype=F64),
            [None] * 300,
            [None] * 300,
        )
        *_, last = mo.online(*args, estimator=mo.BOME(rate=rate), optimizer=lambda p: torch.optim.SGD(p, lr=rate))
        return last

    solution = torch.linalg.solve(A.T @ A + 0.1 * torch.eye(2, dtype=F64), A.T @ b)
    large = run(0.1)
    small = run(0.05)
    errors = [float((last.lam - solution).norm() / solution.norm()) for last in (large, small)]
    assert errors[1] < 0.6 * errors[0] < 0.02
    assert small.hypergradient.info.gap < 0.5 * large.hypergradient.info.gap


# BOME has one barrier for all tasks: test_bome_sees_stacked_tasks_as_one_problem
@pytest.mark.parametrize(
    "estimator", [e for e in FIRST_DERIVATIVES if not isinstance(e, mo.BOME)], ids=lambda e: type(e).__name__
)
def test_meta_batch_is_the_sum_over_tasks(estimator):
    one = small_problem()
    stacked = mo.inner_step(mo.vmapped(one.step.inner_loss), mo.optim.SGD(lr=0.1))
    outer = mo.vmapped(lambda w, lam, _: one.outer(w, lam, None))
    w = {name: torch.stack([value, 0.5 * value]) for name, value in one.w.items()}
    batches = [torch.stack([x, x + 1]) for x in one.batches]
    together = mo.hypergradient(
        stacked, outer, mo.Stacked(w), one.lam, batches, torch.zeros(2), estimator=estimator
    ).total
    first = gradient(one, estimator).total
    second = gradient(one._replace(w=mo.tree.scale(0.5, one.w), batches=[x + 1 for x in one.batches]), estimator).total
    torch.testing.assert_close(flat(together), flat(first) + flat(second), rtol=1e-3, atol=1e-4)


def decays_the_weights(optimizer):
    """Decoupled weight decay, whose fixed points are not those of the loss."""
    try:
        optimizer.loss_decay  # noqa: B018
    except ValueError:
        return True
    return False


@pytest.mark.parametrize("estimator", FIRST_DERIVATIVES, ids=lambda e: type(e).__name__)
class TestFirstDerivatives:
    @pytest.mark.parametrize("case", PLAIN_OPTIMIZERS, ids=ids(PLAIN_OPTIMIZERS))
    def test_every_optimiser_online(self, estimator, case):
        problem = small_problem(case.make())
        if isinstance(estimator, mo.SOBA) and decays_the_weights(case.make()):
            with pytest.raises(ValueError, match="takes its weight decay off the weights"):
                problem.step.stationary(problem.step.init(problem.w, problem.lam), 0.1)
            return
        args = (problem.step, problem.outer, problem.w, problem.lam, problem.batches, [None] * 4)
        reports = list(mo.online(*args, estimator=estimator, optimizer=lambda p: torch.optim.SGD(p, lr=1e-3)))
        expected = problem.lam
        for report in reports:
            assert mo.tree.is_finite(report.hypergradient.total) and flat(report.hypergradient.total).abs().sum() > 0
            expected = mo.tree.map(lambda x, g: x - 1e-3 * g, expected, report.hypergradient.total)
        torch.testing.assert_close(flat(reports[-1].lam), flat(expected), rtol=1e-12, atol=1e-14)

    def test_a_custom_step_is_refused(self, estimator):
        step = mo.custom_step(lambda state, lam, _: state._replace(w=0.5 * (state.w + lam)))
        with pytest.raises((TypeError, ValueError), match=r"CustomStep has no|a custom step is its own"):
            mo.hypergradient(
                step, lambda w, lam, _: (w**2).sum(), t64(1.0), t64(1.0), [None] * 2, None, estimator=estimator
            )

    def test_bad_settings(self, estimator):
        name = "radius" if hasattr(estimator, "radius") else "rate"
        with pytest.raises(ValueError, match=f"{type(estimator).__name__}: {name} must be a number above 0"):
            type(estimator)(**{name: 0.0})


@pytest.mark.parametrize("estimator", [mo.SOBA(), mo.F2SA(), mo.BOME()], ids=lambda e: type(e).__name__)
def test_no_pullback_without_an_outer_loss(estimator):
    problem = small_problem()
    state = problem.step.init(problem.w, problem.lam)
    with pytest.raises(TypeError, match="outer loss"):
        estimator.respond(problem.step, state, problem.lam, estimator.init(problem.step, state, problem.lam))
    assert estimator.needs_outer_loss


@pytest.mark.parametrize(
    "estimator",
    [mo.EvoGrad(noise="gaussian"), mo.ForwardGradient(), mo.UORO(), mo.DARTS(), mo.SAMA()],
    ids=lambda e: type(e).__name__,
)
def test_unroll_gives_the_same(estimator):
    problem = small_problem()
    lam = mo.tree.attach(problem.lam)
    state = mo.unroll(problem.step, problem.w, lam, problem.batches, estimator=estimator)
    total = torch.autograd.grad(problem.outer(state.w, lam, None), mo.tree.leaves(lam))
    torch.testing.assert_close(torch.cat(total), flat(gradient(problem, estimator).total), rtol=1e-10, atol=1e-12)
