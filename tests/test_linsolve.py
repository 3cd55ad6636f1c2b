"""Linear solvers against a dense solve, and implicit differentiation with each of them."""

import warnings

import pytest
import torch
from cases import SOLVERS
from hypothesis import given
from hypothesis import strategies as st

import metaopt as mo
from metaopt import tree
from metaopt.estimators import NotConvergedWarning
from metaopt.linsolve import (
    GMRES,
    MINRES,
    ConjugateGradient,
    Exact,
    Identity,
    Neumann,
    Nystrom,
    PowerIteration,
    Solution,
)
from metaopt.linsolve.base import solve_from
from metaopt.meta import HyperSteps, vmapped
from metaopt.verify import cases, check
from metaopt.verify.cases import ridge

F64 = torch.float64
SEEDS = st.integers(0, 10_000)
SYMMETRIC = [case for case in SOLVERS if case.name != "Identity"]


def system(seed, smallest=0.3, largest=1.5, n=6):
    """A symmetric K with the given ends of its spectrum, and a right side; as a pytree of two leaves."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=F64))[0]
    K = basis @ torch.diag(torch.linspace(smallest, largest, n, dtype=F64)) @ basis.T
    return K, {"a": torch.randn(2, 2, generator=g, dtype=F64), "b": torch.randn(n - 4, generator=g, dtype=F64)}


def by(K):
    return lambda v: tree.unvector(tree.vector(v) @ K, v)


def dense(K, alpha):
    return torch.linalg.solve(K.T, tree.vector(alpha))


# -- the solvers ---------------------------------------------------------------------------------
@pytest.mark.parametrize("case", SYMMETRIC, ids=lambda case: case.name)
@given(seed=SEEDS)
def test_solves_what_a_dense_solve_solves(case, seed):
    K, alpha = system(seed)
    found = case.make().solve(by(K), alpha)
    assert torch.allclose(
        tree.vector(found.x), dense(K, alpha), atol=1e-9 if case.tolerance < 1e-6 else 10 * case.tolerance
    )


@pytest.mark.parametrize("case", [case for case in SOLVERS if "Neumann" not in case.name], ids=lambda case: case.name)
@given(seed=SEEDS)
def test_the_residual_is_the_residual(case, seed):
    K, alpha = system(seed)
    solver = case.make()
    found = solver.solve(by(K), alpha)
    shifted = K + getattr(solver, "damping", 0.0) * torch.eye(len(K), dtype=F64)
    left = tree.vector(alpha) - tree.vector(found.x) @ shifted
    assert float(found.residual) == pytest.approx(float(left.norm() / tree.vector(alpha).norm()), abs=1e-12)


@pytest.mark.parametrize(
    "make", [ConjugateGradient, GMRES, MINRES, Exact, lambda damping: Neumann(200, PowerIteration(), damping)]
)
def test_damping_shifts_the_diagonal(make):
    K, alpha = system(0)
    found = make(damping=0.5).solve(by(K), alpha)
    assert torch.allclose(tree.vector(found.x), dense(K + 0.5 * torch.eye(6, dtype=F64), alpha), atol=1e-9)


@given(seed=SEEDS, terms=st.integers(0, 12), rate=st.floats(0.1, 1.2))
def test_neumanns_error_is_within_its_bound(seed, terms, rate):
    K, alpha = system(seed)
    found = tree.vector(Neumann(terms).solve(by(rate * K), alpha).x) * rate
    exact = dense(K, alpha)
    bound = max(abs(1 - rate * 0.3), abs(1 - rate * 1.5)) ** (terms + 1)
    assert float((found - exact).norm() / exact.norm()) <= bound * (1 + 1e-9)


@given(seed=SEEDS)
def test_the_estimated_spectrum_is_seen_from_inside(seed):
    K, alpha = system(seed)
    found = PowerIteration(200).spectrum(by(K), alpha)
    assert 1.5 - 1e-3 < found.largest <= 1.5 + 1e-12
    assert 0.3 - 1e-12 <= found.smallest < 0.3 + 1e-2
    assert found.bound(5) == pytest.approx((1 - found.smallest / found.largest) ** 6)


def test_a_spectrum_and_a_sketch_are_used_again():
    K, alpha = system(0)
    for solver, first, second in ((Neumann(5, PowerIteration(7)), 19, 5), (Nystrom(rank=3, uses=2), 4, 1)):
        found = solver.solve(by(K), alpha)
        again = solver.solve(by(K), alpha, found.memory)
        assert (found.products, again.products) == (first, second)
        assert torch.equal(tree.vector(found.x), tree.vector(again.x))
    assert Nystrom(rank=3, uses=1).solve(by(K), alpha, Nystrom(rank=3).solve(by(K), alpha).memory).products == 4


@given(seed=SEEDS, rank=st.integers(1, 6))
def test_nystrom_is_woodbury_of_its_columns(seed, rank):
    K, alpha = system(seed)
    solver = Nystrom(rank=rank, damping=0.1, seed=seed)
    chosen = torch.randperm(6, generator=torch.Generator().manual_seed(seed))[:rank]
    C = K[:, chosen]
    low_rank = C @ torch.linalg.inv(C[chosen]) @ C.T
    assert torch.allclose(
        tree.vector(solver.solve(by(K), alpha).x), dense(low_rank + 0.1 * torch.eye(6, dtype=F64), alpha), atol=1e-8
    )


def test_what_each_solver_is_for():
    K, alpha = system(0, smallest=-0.5)  # indefinite
    assert torch.allclose(tree.vector(MINRES().solve(by(K), alpha).x), dense(K, alpha), atol=1e-8)
    with pytest.raises(ArithmeticError, match="curvature"):
        ConjugateGradient().solve(by(K), alpha)
    with pytest.raises(ArithmeticError, match="no rate"):
        Neumann(rate=PowerIteration()).solve(by(-system(0)[0]), alpha)
    K = K + torch.triu(torch.ones(6, 6, dtype=F64), 1)  # not symmetric
    assert torch.allclose(tree.vector(GMRES().solve(by(K), alpha).x), dense(K, alpha), atol=1e-8)
    with pytest.raises(ArithmeticError, match="singular"):
        Exact().solve(by(torch.zeros(6, 6, dtype=F64)), alpha)
    with pytest.raises(ValueError, match="more than limit"):
        Exact(limit=3).solve(by(K), alpha)


@pytest.mark.parametrize("case", SOLVERS, ids=lambda case: case.name)
def test_a_warm_start_from_the_solution_stays_there(case):
    K, alpha = system(3)
    exact = tree.unvector(dense(K, alpha), alpha)
    found = solve_from(case.make(), by(K), alpha, Solution(exact, torch.zeros(()), 0))
    assert torch.allclose(tree.vector(found.x), tree.vector(exact), atol=1e-10)
    assert float(found.residual) < 1e-10


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Neumann(-1), "terms"),
        (lambda: Neumann(2, rate=-0.1), "rate"),
        (lambda: ConjugateGradient(0), "iterations"),
        (lambda: GMRES(damping=-1.0), "damping"),
        (lambda: MINRES(tolerance=-1.0), "tolerance"),
        (lambda: Nystrom(rank=0), "rank"),
        (lambda: Nystrom(damping=0.0), "damping"),
        (lambda: Exact(limit=0), "limit"),
        (lambda: Identity(rate=0.0), "rate"),
        (lambda: PowerIteration(0), "iterations"),
        (lambda: Neumann(2, damping=0.1), "damping needs a rate"),
    ],
)
def test_settings_out_of_range_are_named(make, named):
    with pytest.raises(ValueError, match=named):
        make()


# -- implicit differentiation --------------------------------------------------------------------
EXACT = [Exact(), ConjugateGradient(30), MINRES(), GMRES(), Neumann(400, PowerIteration(100)), Neumann(2000, rate=0.3)]


@pytest.mark.parametrize("solver", EXACT, ids=lambda solver: type(solver).__name__)
def test_exact_at_the_minimum(solver):
    problem = ridge()
    found = mo.hypergradient(
        problem.step,
        problem.outer_loss,
        problem.w0,
        problem.lam,
        problem.batches,
        problem.outer_batch,
        estimator=mo.IFT(solver, converged=1e-8),
    )
    (ours,) = tree.leaves(found.total)
    (exact,) = tree.leaves(problem.exact(10_000))
    assert torch.allclose(ours, exact, atol=1e-10)
    assert float(found.info.residual) < 1e-10


@pytest.mark.parametrize(
    "solver",
    [Exact(), Exact(0.2), MINRES(), GMRES(), Identity(), Neumann(4, 0.1, 0.3), Neumann(9, PowerIteration())],
    ids=repr,
)
@given(seed=SEEDS)
def test_its_own_formula_everywhere(solver, seed):
    report = check(
        mo.IFT(solver, converged=None, solved=None),
        problems=[cases.quadratic, cases.non_commuting, cases.momentum],
        seed=seed,
    )
    assert report.passed, report


def quadratic(w, lam, batch):
    return 0.5 * (torch.tensor([1.0, 2.0], dtype=F64) * (w - lam["target"]).square()).sum()


def outer(w, lam, batch):
    return w.square().sum()


LAM = {"target": torch.tensor([1.0, -1.0], dtype=F64), "rate": torch.tensor(0.1, dtype=F64)}


def test_not_converged_is_warned_of_and_can_be_meant():
    step = mo.inner_step(quadratic, mo.optim.SGD(lr=0.1))
    lam = {"target": LAM["target"]}
    run = (step, outer, torch.zeros(2, dtype=F64), lam, [None] * 3, None)
    with pytest.warns(NotConvergedWarning, match="inner gradient's norm"):
        mo.hypergradient(*run, estimator=mo.IFT(Exact()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mo.hypergradient(*run, estimator=mo.IFT(Exact(), converged=None))
    with pytest.warns(NotConvergedWarning, match="relative residual"):
        mo.hypergradient(*run, estimator=mo.IFT(Neumann(20, rate=1.5), converged=None))


def test_a_learning_rate_has_no_implicit_derivative():
    step = mo.inner_step(quadratic, mo.optim.SGD(lr=lambda lam, t: lam["rate"]))
    with pytest.raises(ValueError, match=r"rate.* enters only through the optimiser"):
        mo.hypergradient(
            step, outer, torch.zeros(2, dtype=F64), LAM, [None] * 3, None, estimator=mo.IFT(Exact(), converged=None)
        )


@pytest.mark.parametrize(
    "optimizer", [mo.optim.SGD(lr=0.3, momentum=0.5), mo.optim.Adam(lr=0.05), mo.optim.RMSprop(lr=0.01)], ids=repr
)
def test_any_optimiser_may_have_solved_the_problem(optimizer):
    lam = {"target": LAM["target"]}
    step = mo.inner_step(quadratic, optimizer)
    found = mo.hypergradient(step, outer, lam["target"].clone(), lam, [None] * 2, None, estimator=mo.IFT(Exact()))
    assert torch.allclose(found.total["target"], 2 * lam["target"], atol=1e-10)  # w* = target


def test_stacked_tasks_equal_a_loop_over_them():
    def inner_loss(w, lam, batch):
        return ((w - batch).square() * lam.exp()).sum() / 2 + w.square().sum() / 2

    lam = torch.zeros(3, dtype=F64)
    targets = torch.randn(4, 3, dtype=F64)
    w0 = targets / 2  # the minimum at λ = 0
    step = mo.inner_step(vmapped(inner_loss), mo.optim.SGD(lr=0.1))
    loss = vmapped(lambda w, lam, batch: (w - 1).square().sum())
    for solver in (Exact(), ConjugateGradient(20), Neumann(3), Nystrom(rank=20, damping=1e-3)):
        together = mo.hypergradient(
            step, loss, mo.Stacked(w0), lam, [targets], targets, estimator=mo.IFT(solver, solved=None)
        ).total
        apart = [
            mo.hypergradient(
                step,
                loss,
                mo.Stacked(w0[i : i + 1]),
                lam,
                [targets[i : i + 1]],
                targets[i : i + 1],
                estimator=mo.IFT(solver, solved=None),
            ).total
            for i in range(4)
        ]
        assert torch.allclose(together, torch.stack(apart).sum(0), atol=1e-8), solver


def test_online_a_warm_start_saves_products():
    lam = {"target": LAM["target"]}
    step = mo.inner_step(quadratic, mo.optim.SGD(lr=0.1))

    def products(warm):
        estimator = mo.IFT(ConjugateGradient(20, tolerance=1e-4), warm_start=warm)
        run = mo.online(
            step,
            outer,
            lam["target"].clone(),
            lam,
            [None] * 6,
            [None] * 6,
            estimator=estimator,
            optimizer=torch_sgd,
            hyper_steps=HyperSteps(),
        )
        return [report.hypergradient.info.products for report in run]

    def torch_sgd(params):
        return torch.optim.SGD(params, lr=1e-6)

    cold = products(False)
    warm = products(True)
    assert cold[0] == warm[0] == 2 + 1
    assert sum(warm[1:]) < sum(cold[1:])


# -- the default ---------------------------------------------------------------------------------
def regression():
    torch.manual_seed(0)
    X = torch.randn(30, 5, dtype=F64)
    y = torch.randn(30, dtype=F64)

    def inner(w, lam, _):
        return ((X @ w - y) ** 2).mean() / 2 + lam.exp() * w.pow(2).sum() / 2

    def outer(w, lam, _):
        return ((X @ w - y - 0.3) ** 2).mean()

    lam = torch.tensor(-1.0, dtype=F64, requires_grad=True)
    solution = torch.linalg.solve(X.T @ X / 30 + lam.exp() * torch.eye(5, dtype=F64), X.T @ y / 30)
    (expected,) = torch.autograd.grad(outer(solution, lam, None), lam)
    return inner, outer, solution.detach(), lam.detach(), expected


@pytest.mark.parametrize("lr", [0.5, 0.1, 1e-2, 1e-4])
@pytest.mark.parametrize("make", [mo.optim.SGD, mo.optim.Adam, mo.optim.RMSprop])
def test_the_default_is_right_at_a_solution_whatever_the_rate_was(lr, make):
    inner, outer, solution, lam, expected = regression()
    step = mo.inner_step(inner, make(lr=lr))
    hg = mo.hypergradient(step, outer, solution, lam, [None], None, estimator=mo.IFT())
    torch.testing.assert_close(hg.total, expected, rtol=1e-8 if make is mo.optim.SGD else 0.2, atol=0)
    if make is mo.optim.SGD:
        assert hg.info.residual < 1e-8


def test_the_default_for_a_custom_step_is_gmres():
    """A rotation with a contraction: not symmetric, so that conjugate gradients would be wrong."""
    A = torch.tensor([[0.5, -0.6], [0.6, 0.5]], dtype=F64)
    step = mo.custom_step(lambda state, lam, _: state._replace(w=state.w @ A + lam))
    lam = torch.tensor([1.0, -2.0], dtype=F64)
    fixed = torch.linalg.solve((torch.eye(2, dtype=F64) - A).T, lam)
    hg = mo.hypergradient(step, lambda w, lam, _: (w**2).sum(), fixed, lam, [None], None, estimator=mo.IFT())
    torch.testing.assert_close(hg.total, torch.linalg.solve(torch.eye(2, dtype=F64) - A, 2 * fixed))


@pytest.mark.parametrize(
    "solver", [Neumann(5, rate=0.01), ConjugateGradient(1), GMRES(1), MINRES(1), Nystrom(rank=1)], ids=repr
)
def test_every_solver_that_has_not_solved_it_is_told(solver):
    inner, outer, solution, lam, _ = regression()
    step = mo.inner_step(inner, mo.optim.SGD(lr=0.1))
    with pytest.warns(NotConvergedWarning, match=r"relative residual.*above\s+solved=0.1"):
        mo.hypergradient(step, outer, solution, lam, [None], None, estimator=mo.IFT(solver))


def test_conjugate_gradients_on_what_is_not_symmetric_is_told():
    A = torch.tensor([[0.5, -0.6], [0.6, 0.5]], dtype=F64)
    step = mo.custom_step(lambda state, lam, _: state._replace(w=state.w @ A + lam))
    lam = torch.tensor([1.0, -2.0], dtype=F64)
    fixed = torch.linalg.solve((torch.eye(2, dtype=F64) - A).T, lam)
    with pytest.warns(NotConvergedWarning, match="relative residual"):
        mo.hypergradient(
            step, lambda w, lam, _: w[0] ** 2, fixed, lam, [None], None, estimator=mo.IFT(ConjugateGradient(2))
        )


@pytest.mark.parametrize("make", [mo.optim.SGD, mo.optim.Adam])
def test_weight_decay_that_is_added_to_the_gradient_is_part_of_the_problem(make):
    inner, outer, _, lam, _ = regression()
    decayed = mo.inner_step(inner, make(lr=0.1, weight_decay=0.4))
    in_loss = mo.inner_step(lambda w, lam, b: inner(w, lam, b) + 0.2 * w.pow(2).sum(), mo.optim.SGD(lr=0.1))
    state = in_loss.init(torch.zeros(5, dtype=F64), lam)
    for _ in range(2000):
        state = in_loss(state, lam, None)
    arguments = outer, state.w, lam, [None], None
    expected = mo.hypergradient(in_loss, *arguments, estimator=mo.IFT()).total
    found = mo.hypergradient(decayed, *arguments, estimator=mo.IFT(converged=None)).total
    torch.testing.assert_close(found, expected, rtol=0.05 if make is mo.optim.Adam else 1e-8, atol=0)


def test_decoupled_weight_decay_is_refused_by_name():
    inner, outer, solution, lam, _ = regression()
    step = mo.inner_step(inner, mo.optim.AdamW(lr=0.1))
    with pytest.raises(ValueError, match="AdamW takes its weight decay off the weights"):
        mo.hypergradient(step, outer, solution, lam, [None], None, estimator=mo.IFT())
