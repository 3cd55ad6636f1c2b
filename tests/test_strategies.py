"""Properties over random problems: the exact methods are autograd through the loop, pullbacks are adjoints, λ may be any pytree."""

import subprocess
import sys
from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

import metaopt as mo
from metaopt import tree
from metaopt.estimators.cost import Cost
from metaopt.verify import check, reference
from metaopt.verify.reference import unvector, vector
from metaopt.verify.strategies import closed_forms, mlp_problems, pytrees

PROBLEMS = closed_forms() | mlp_problems()
SETTINGS = {"rtol": 1e-8, "atol": 1e-10}


def gradient(problem, estimator):
    return mo.hypergradient(
        problem.step,
        problem.outer_loss,
        problem.w0,
        problem.lam,
        problem.batches,
        problem.outer_batch,
        estimator=estimator,
    )


def exact_methods(T):
    return [
        mo.RMD(),
        mo.TruncatedRMD(T),
        mo.RMD(mo.trajectory.Checkpointed(slots=2)),
        mo.RMD(mo.trajectory.Graphs()),
        mo.FMD(),
    ]


@given(problem=PROBLEMS, which=st.integers(0, 4))
def test_exact_methods_are_autograd_through_the_loop(problem, which):
    T = len(problem.batches)
    want = reference.through_loop(problem, T)
    torch.testing.assert_close(gradient(problem, exact_methods(T)[which]).total, want, **SETTINGS)
    if problem.exact is not None:
        torch.testing.assert_close(want, problem.exact(T), **SETTINGS)


@given(problem=PROBLEMS)
def test_the_dense_sweep_is_autograd_through_the_loop(problem):
    T = len(problem.batches)
    run = reference.states(problem, T)
    alpha, direct = reference.outer_cotangent(problem.outer_loss, run[-1], problem.lam, problem.outer_batch)
    swept = reference.dense_sweep(alpha, reference.along(problem, run, T))
    torch.testing.assert_close(direct + swept, vector(reference.through_loop(problem, T)), **SETTINGS)


@given(problem=mlp_problems())
def test_finite_differences_are_within_their_error(problem):
    T = len(problem.batches)
    estimate = reference.finite_differences(problem, T)
    assert float((estimate.value - vector(reference.through_loop(problem, T))).abs().max()) <= 10 * estimate.error


@given(problem=mlp_problems())
def test_steps_keep_their_contract(problem):
    report = check(problem.step, problem.w0, problem.lam, problem.batches[0])
    assert report.passed, report


@given(problem=mlp_problems(), seed=st.integers(0, 1000))
def test_pullbacks_are_linear(problem, seed):
    noise = torch.randn(
        2, vector(problem.w0).numel(), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    one, two = (unvector(row, problem.w0) for row in noise)
    for estimator in (
        mo.RMD(),
        mo.DrMAD(),
        mo.OneStep(),
        mo.HyperDistill(gamma=0.5),
        mo.EvoGrad(noise="gaussian"),
        mo.UORO(),
        mo.PES(),
    ):
        state = problem.step.init(problem.w0, problem.lam)
        carry = estimator.init(problem.step, state, problem.lam)
        for batch in problem.batches:
            state, carry = estimator.advance(problem.step, state, problem.lam, batch, carry)
        _, pullback = estimator.respond(problem.step, state, problem.lam, carry)
        both = pullback(tree.add(tree.scale(2.0, one), two)).lam
        parts = tree.add(tree.scale(2.0, pullback(one).lam), pullback(two).lam)
        torch.testing.assert_close(both, parts, rtol=1e-9, atol=1e-10)


@given(problem=mlp_problems(), K=st.integers(1, 4))
def test_truncation_drops_the_first_steps(problem, K):
    T = len(problem.batches)
    run = reference.states(problem, T)
    alpha, direct = reference.outer_cotangent(problem.outer_loss, run[-1], problem.lam, problem.outer_batch)
    want = direct + reference.dense_sweep(alpha, reference.along(problem, run, T, last=K))
    torch.testing.assert_close(vector(gradient(problem, mo.TruncatedRMD(K)).total), want, **SETTINGS)


@given(problem=mlp_problems(optimizers=[mo.optim.SGD(lr=0.1)]))
def test_first_steps_where_every_approximation_is_exact(problem):
    problem = replace(problem, batches=problem.batches[:1])
    want = reference.through_loop(problem, 1)
    for estimator in (mo.DrMAD(), mo.OneStep(), mo.HyperDistill(gamma=0.9)):
        torch.testing.assert_close(gradient(problem, estimator).total, want, **SETTINGS)


@given(problem=mlp_problems())
def test_cost_is_what_the_cost_model_says(problem):
    T = len(problem.batches)
    cost = gradient(problem, mo.RMD(mo.trajectory.Full())).cost
    assert (cost.steps, cost.linearizations) == (T, T)
    assert cost.products in (2 * T - 1, 2 * T)
    assert gradient(problem, mo.FirstOrder()).cost == Cost(steps=T)


@given(lam=pytrees())
def test_pytrees_become_vectors_and_back(lam):
    assert tree.floats(lam)
    again = unvector(vector(lam), lam)
    assert tree.flatten(again)[1] == tree.flatten(lam)[1]
    torch.testing.assert_close(again, lam, rtol=0, atol=0)


@given(problem=mlp_problems())
def test_a_hypergradient_is_like_lam_and_nothing_is_changed(problem):
    before = tree.clone((problem.w0, problem.lam, problem.batches))
    total = gradient(problem, mo.RMD()).total
    assert tree.flatten(total)[1] == tree.flatten(problem.lam)[1]
    assert all(bool((leaf != 0).all()) for leaf in tree.leaves(total))
    torch.testing.assert_close((problem.w0, problem.lam, problem.batches), before, rtol=0, atol=0)


def test_hypothesis_is_optional_and_its_absence_named():
    code = (
        "import sys; sys.modules['hypothesis'] = None; sys.modules['hypothesis.strategies'] = None\n"
        "import metaopt as mo\n"
        "try:\n    mo.verify.strategies.closed_forms()\nexcept ImportError as error:\n    print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install hypothesis" in result.stdout
