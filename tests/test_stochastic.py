"""Methods that draw random numbers: EvoGrad, forward gradient, UORO, evolution strategies."""

import contextlib
import dataclasses
import functools
import math
from typing import NamedTuple

import pytest
import torch
from cases import PLAIN_OPTIMIZERS, ids

import metaopt as mo
from metaopt.estimators.cost import Cost, CountedStep
from metaopt.estimators.hypergradient import evaluate

F64 = torch.float64


def t64(*values):
    return torch.tensor(values, dtype=F64)


class Problem(NamedTuple):
    step: mo.inner.Step
    outer: object
    w: dict
    lam: dict
    batches: list


def small_problem(optimizer=None, steps=4):
    """Two weights matrices' worth of coupling, λ inside the loss twice over; nothing quadratic."""
    g = torch.Generator().manual_seed(3)
    w = {"a": torch.randn(2, generator=g, dtype=F64), "b": torch.randn(1, generator=g, dtype=F64)}
    lam = {"decay": t64(0.3), "target": torch.randn(2, generator=g, dtype=F64)}
    batches = [torch.randn(3, 2, generator=g, dtype=F64) for _ in range(steps)]

    def loss(w, lam, x):
        return (torch.tanh(x @ w["a"]) - w["b"] - x @ lam["target"]).pow(2).mean() + lam["decay"].exp().sum() * (
            w["a"] ** 2
        ).sum()

    def outer(w, lam, x):
        return (w["a"].sin().sum() - w["b"]).pow(2).sum() + 0.1 * (lam["target"] ** 2).sum()

    return Problem(mo.inner_step(loss, optimizer or mo.optim.SGD(lr=0.1)), outer, w, lam, batches)


def flat(tree):
    return torch.cat([leaf.reshape(-1) for leaf in mo.tree.leaves(tree)])


def gradient(problem, estimator):
    return mo.hypergradient(
        problem.step, problem.outer, problem.w, problem.lam, problem.batches, None, estimator=estimator
    )


def reseeded(estimator, count):
    return (dataclasses.replace(estimator, seed=seed) for seed in range(count))


def within_standard_errors(samples, expected, errors=4.0, tiny=1e-12):
    mean = samples.mean(0)
    se = samples.std(0) / math.sqrt(len(samples))
    assert bool(((mean - expected).abs() <= errors * se + tiny).all()), (mean, expected, se)


RANDOM = [
    mo.EvoGrad(check_size=False),
    mo.PES(window=2),
    mo.NRES(),
    mo.AntitheticES(),
    mo.TruncatedES(window=2),
    mo.ForwardGradient(),
    mo.UORO(),
]


@pytest.mark.parametrize("estimator", RANDOM, ids=lambda e: type(e).__name__)
class TestRandomMethods:
    def test_global_generator_is_untouched_and_a_seed_is_a_result(self, estimator):
        problem = small_problem()
        before = torch.get_rng_state()
        first = gradient(problem, estimator)
        again = gradient(problem, estimator)
        assert torch.equal(before, torch.get_rng_state())
        assert torch.equal(flat(first.total), flat(again.total))
        other = gradient(problem, dataclasses.replace(estimator, seed=1))
        assert not torch.equal(flat(first.total), flat(other.total))

    def test_pullback_is_linear(self, estimator):
        problem = small_problem()
        state = problem.step.init(problem.w, problem.lam)
        carry = estimator.init(problem.step, state, problem.lam)
        for batch in problem.batches:
            state, carry = estimator.advance(problem.step, state, problem.lam, batch, carry)
        _, pullback = estimator.respond(problem.step, state, problem.lam, carry)
        one = mo.tree.map(torch.sin, state.w)
        two = mo.tree.map(torch.cos, state.w)
        both = pullback(mo.tree.add(mo.tree.scale(2.0, one), two)).lam
        torch.testing.assert_close(
            flat(both), 2 * flat(pullback(one).lam) + flat(pullback(two).lam), rtol=1e-9, atol=1e-12
        )
        assert flat(both).abs().max() > 0

    @pytest.mark.parametrize("case", PLAIN_OPTIMIZERS, ids=ids(PLAIN_OPTIMIZERS))
    def test_every_optimiser_and_online(self, estimator, case):
        problem = small_problem(case.make())
        assert mo.tree.is_finite(gradient(problem, estimator).total)
        args = (
            problem.step,
            problem.outer,
            problem.w,
            problem.lam,
            problem.batches,
            [None] * 4,
        )
        run = functools.partial(mo.online, *args, estimator=estimator, optimizer=lambda p: torch.optim.SGD(p, lr=1e-3))
        if estimator.online:
            assert len([r for r in run() if r.hypergradient is not None]) == 4
        else:
            with pytest.raises(ValueError, match="fixed"):
                run()

    def test_dropout_is_replayed_not_redrawn(self, estimator):
        problem = small_problem()

        def noisy(w, lam, x):
            return (torch.nn.functional.dropout(x, 0.5) @ (w["a"] - lam["target"])).pow(2).sum() + w["b"].sum()

        problem = problem._replace(step=mo.inner_step(noisy, mo.optim.SGD(lr=0.1)))
        torch.manual_seed(5)
        plain = problem.step.init(problem.w, problem.lam)
        for batch in problem.batches:
            plain = problem.step(plain, problem.lam, batch)
        after = torch.get_rng_state()
        torch.manual_seed(5)
        with (
            pytest.warns(mo.UnusedHyperparameterWarning)
            if isinstance(estimator, mo.EvoGrad)
            else contextlib.nullcontext()
        ):
            hg = gradient(problem, estimator)
        assert torch.equal(flat(hg.state.w), flat(plain.w))
        assert torch.equal(after, torch.get_rng_state())


# -- unbiased methods ----------------------------------------------------------------------------
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(
    "estimator", [mo.ForwardGradient(), mo.ForwardGradient(noise="gaussian"), mo.UORO()], ids=lambda e: repr(e)[:40]
)
def test_mean_is_the_exact_gradient(estimator, momentum):
    problem = small_problem(mo.optim.SGD(lr=0.05, momentum=momentum), steps=3)
    exact = gradient(problem, mo.RMD()).total
    samples = torch.stack([flat(gradient(problem, e).total) for e in reseeded(estimator, 100)])
    within_standard_errors(samples, flat(exact))
    assert samples.std(0).max() > 1e-4


def test_directions_and_sketches_average():
    problem = small_problem()
    for one, many in ((mo.ForwardGradient(), mo.ForwardGradient(directions=16)), (mo.UORO(), mo.UORO(sketches=16))):
        spread = [
            torch.stack([flat(gradient(problem, e).total) for e in reseeded(m, 6)]).std(0).norm() for m in (one, many)
        ]
        assert spread[1] < 0.7 * spread[0]


def test_forward_gradient_along_one_hyperparameter_is_exact():
    step = mo.inner_step(lambda w, lam, _: 0.5 * ((w - lam) ** 2).sum(), mo.optim.SGD(lr=0.1))
    hg = mo.hypergradient(
        step, lambda w, lam, _: (w**2).sum(), t64(2.0), t64(1.0), [None] * 6, None, estimator=mo.ForwardGradient()
    )
    torch.testing.assert_close(hg.total, 2 * (1 + 0.9**6) * (1 - 0.9 ** t64(6)))


# -- evolution strategies ------------------------------------------------------------------------
def influence_balancing(steps=60, n=23, positive=10):
    """Loss of step t: ½(x_1 - 1)²; its true gradient has the other sign of size over short windows."""
    A = 0.5 * torch.eye(n, dtype=F64) + 0.5 * torch.diag(torch.ones(n - 1, dtype=F64), 1)
    b = torch.ones(n, dtype=F64)
    b[positive:] = -1
    step = mo.custom_step(lambda state, lam, _: mo.InnerState(A @ state.w + lam * b))
    return step, lambda w, lam, _: 0.5 * (w[0] - 1) ** 2, torch.ones(n, dtype=F64), torch.tensor(0.5, dtype=F64)


def mean_over_steps(estimator, problem, steps=60):
    """The hypergradient of the mean of the losses of all steps."""
    step, outer, w, lam = problem
    counted = CountedStep(step, Cost())
    state = counted.init(w, lam)
    total = 0.0
    carry = estimator.init(counted, state, lam)
    for _ in range(steps):
        state, carry = estimator.advance(counted, state, lam, None, carry)
        total = total + evaluate(counted, outer, state, lam, None, estimator, carry).total / steps
    return total


def test_influence_balancing():
    problem = influence_balancing()
    exact = mean_over_steps(mo.RMD(), problem)
    assert exact.item() == pytest.approx(43.568, abs=1e-3)
    for estimator, expected in (
        (mo.PES(pairs=4, window=5, sigma=0.1), exact),
        (mo.TruncatedES(pairs=4, window=5, sigma=0.1), t64(6.549)[0]),
    ):
        within_standard_errors(torch.stack([mean_over_steps(e, problem) for e in reseeded(estimator, 16)]), expected)


def test_linear_response_makes_antithetic_es_unbiased():
    problem = small_problem(steps=3)
    step = mo.inner_step(
        lambda w, lam, x: 0.5 * ((w["a"] - lam["target"]) ** 2).sum() + w["b"].pow(2).sum(), mo.optim.SGD(lr=0.1)
    )
    problem = problem._replace(step=step, outer=lambda w, lam, _: (w["a"] ** 2).sum() + lam["decay"].sum())
    exact = flat(gradient(problem, mo.RMD()).total)
    for estimator in (mo.AntitheticES(), mo.NRES(), mo.PES(window=1), mo.PES(window=2)):
        within_standard_errors(torch.stack([flat(gradient(problem, e).total) for e in reseeded(estimator, 100)]), exact)


def test_es_formulas():
    problem = small_problem(steps=3)
    sigma = 0.01
    noise = mo.estimators.evolution._noise
    eps, _ = noise.draw(problem.lam, "gaussian", noise.start(0))

    def final(sign):
        lam = mo.tree.add(problem.lam, mo.tree.scale(sign * sigma, eps))
        state = problem.step.init(problem.w, lam)
        for batch in problem.batches:
            state = problem.step(state, lam, batch)
        return problem.outer(state.w, lam, None)

    expected = flat(eps) * (final(1) - final(-1)) / (2 * sigma)
    for estimator in (
        mo.AntitheticES(sigma=sigma),
        mo.NRES(sigma=sigma),
        mo.PES(sigma=sigma, window=3),
        mo.TruncatedES(sigma=sigma, window=3),
    ):
        torch.testing.assert_close(flat(gradient(problem, estimator).total), expected, rtol=1e-10, atol=0)


def test_es_through_a_loop_that_cannot_be_differentiated():
    """Weights on a grid: rounding has derivative zero, the response is 1 on every larger scale."""
    step = mo.custom_step(
        lambda state, lam, _: mo.InnerState(torch.round(64 * (state.w + 0.25 * (lam - state.w))) / 64)
    )

    def accuracy_like(w, lam, _):
        return (w > 0.4).to(F64).mean() + w.mean()

    w = torch.zeros(3, dtype=F64)
    lam = t64(0.3, 0.5, 0.9)
    hg = mo.hypergradient(
        step, accuracy_like, w, lam, [None] * 20, None, estimator=mo.AntitheticES(pairs=150, sigma=0.2)
    )
    smooth = lambda x: 1 / 3 + torch.exp(-((x - 0.4) ** 2) / 0.08) / (3 * 0.2 * math.sqrt(2 * math.pi))  # noqa: E731
    torch.testing.assert_close(hg.total, smooth(lam), atol=0.35, rtol=0)
    assert (
        float(
            mo.hypergradient(
                step, lambda w, lam, _: w.sum() + lam.sum() * 0, w, lam, [None] * 20, None, estimator=mo.RMD()
            )
            .total.abs()
            .max()
        )
        == 0
    )


def test_es_says_when_nothing_depends_on_lam():
    problem = small_problem()._replace(outer=lambda w, lam, _: torch.ones((), dtype=F64))
    with pytest.warns(mo.ZeroHypergradientWarning, match="sigma"):
        gradient(problem, mo.PES())


def test_offline_es_refuses_a_lam_that_moves():
    problem = small_problem()
    estimator = mo.AntitheticES()
    state = problem.step.init(problem.w, problem.lam)
    carry = estimator.init(problem.step, state, problem.lam)
    with pytest.raises(RuntimeError, match="AntitheticES"):
        estimator.advance(problem.step, state, mo.tree.clone(problem.lam), problem.batches[0], carry)


# -- EvoGrad -------------------------------------------------------------------------------------
@pytest.mark.parametrize("noise", ["sign", "gaussian"])
@pytest.mark.parametrize("copies_at_once", [None, 1, 2])
def test_evograd_formula(noise, copies_at_once):
    problem = small_problem(steps=1)
    estimator = mo.EvoGrad(copies=3, sigma=0.2, temperature=0.4, noise=noise, copies_at_once=copies_at_once, seed=7)
    step = problem.step
    w = problem.w
    x = problem.batches[0]
    state, carry = estimator.advance(
        step, step.init(w, problem.lam), problem.lam, x, estimator.init(step, step.init(w, problem.lam), problem.lam)
    )
    eps = estimator.perturbations(carry)
    lam = mo.tree.attach(problem.lam)
    thetas = [mo.tree.map(lambda p, e, k=k: p + e[k], w, eps) for k in range(3)]
    weights = torch.softmax(-torch.stack([step.loss(theta, lam, x) for theta in thetas]) / 0.4, 0)
    point = {name: sum(weights[k] * thetas[k][name] for k in range(3)) for name in w}
    expected = torch.autograd.grad(problem.outer(point, lam, None), mo.tree.leaves(lam))
    hg = gradient(problem, estimator)
    torch.testing.assert_close(flat(hg.total), torch.cat(expected), rtol=1e-10, atol=1e-12)
    assert flat(hg.indirect).abs().max() > 1e-6
    assert torch.equal(flat(hg.state.w), flat(state.w))


SEEN = {2: (-0.176, -0.044, 0.003, 0.017), 10: (-0.326, -0.085, 0.000, 0.026), 100: (-0.320, -0.073, 0.008, 0.031)}


@pytest.mark.parametrize("copies", SEEN)
def test_evograd_one_dimensional_means(copies):
    """Figures 2 and 3: the 1-d problem, x ~ N(0, 1), Gaussian noise; the seen figures carry a standard error of up to 0.004 themselves."""
    draws = 250
    step = mo.inner_step(lambda w, lam, _: (w - 1) ** 2 + lam * w**2, mo.optim.SGD(lr=0.01))
    start = torch.randn(draws, generator=torch.Generator().manual_seed(11), dtype=F64)
    estimator = mo.EvoGrad(copies=copies, sigma=1.0, temperature=0.5, noise="gaussian")
    for lam, seen in zip((0.1, 0.5, 1.0, 2.0), SEEN[copies], strict=True):
        values = [
            mo.hypergradient(
                step, lambda w, lam, _: (w - 0.5) ** 2, w, torch.tensor(lam, dtype=F64), [None], None, estimator=e
            ).total
            for w, e in zip(start, reseeded(estimator, draws), strict=True)
        ]
        samples = torch.stack(values)
        assert abs(float(samples.mean()) - seen) <= 5 * math.hypot(float(samples.std()) / math.sqrt(draws), 0.004)


@pytest.mark.filterwarnings("ignore:EvoGrad. all 3 perturbed copies")  # they belong to the mean
@pytest.mark.parametrize("noise", ["sign", "gaussian"])
def test_small_sigma_mean_is_one_step(noise):
    problem = small_problem(mo.optim.SGD(lr=1.0), steps=1)
    estimator = mo.EvoGrad(copies=3, sigma=1e-4, temperature=0.05, noise=noise, unit_rate=True)
    step = problem.step
    state = step.init(problem.w, problem.lam)
    _, alpha, _ = mo.estimators.outer.outer_gradient(problem.outer, problem.w, problem.lam, None)
    _, one_step = step.vjp(state, problem.lam, problem.batches[0], mo.InnerState(alpha, None), wrt="lam")
    samples = torch.stack([flat(gradient(problem, e).indirect) for e in reseeded(estimator, 400)])
    within_standard_errors(samples, flat(one_step))
    plain = gradient(problem, dataclasses.replace(estimator, unit_rate=False)).indirect
    torch.testing.assert_close(flat(plain), estimator.effective_rate * samples[0])


def test_evograd_settings():
    problem = small_problem()
    part = gradient(problem, mo.EvoGrad(noise="gaussian", sigma=0.1, perturb=["a"]))
    other = gradient(problem, mo.EvoGrad(noise="gaussian", sigma=0.1, perturb=["*"]))
    assert not torch.equal(flat(part.total), flat(other.total))
    state = problem.step.init(problem.w, problem.lam)
    estimator = mo.EvoGrad(noise="gaussian", perturb=["a"], around="after")
    new, carry = estimator.advance(
        problem.step, state, problem.lam, problem.batches[0], estimator.init(problem.step, state, problem.lam)
    )
    assert torch.equal(carry.w["a"], new.w["a"])
    assert float(estimator.perturbations(carry)["b"].abs().max()) == 0
    with pytest.raises(ValueError, match="matches no weight to perturb"):
        gradient(problem, mo.EvoGrad(perturb=["head.*"]))
    for bad in (
        {"copies": 1},
        {"sigma": 0.0},
        {"temperature": -1.0},
        {"noise": "uniform"},
        {"around": "now"},
        {"copies_at_once": 0},
    ):
        with pytest.raises(ValueError, match="EvoGrad"):
            mo.EvoGrad(**bad)
    custom = mo.custom_step(lambda state, lam, _: state._replace(w=state.w * lam))
    with pytest.raises(TypeError, match="inner loss"):
        mo.hypergradient(custom, lambda w, lam, _: w.sum(), t64(1.0), t64(1.0), [None], None, estimator=mo.EvoGrad())


def test_identical_copies_are_noticed():
    step = mo.inner_step(lambda w, lam, _: ((w - lam) ** 2).sum(), mo.optim.SGD(lr=0.1))
    noticed = 0
    for estimator in reseeded(mo.EvoGrad(), 16):
        args = (step, lambda w, lam, _: (w**2).sum(), t64(1.0), t64(0.5), [None], None)
        state = step.init(args[2], args[3])
        _, carry = estimator.advance(step, state, args[3], None, estimator.init(step, state, args[3]))
        noise = mo.estimators.evograd._noise.draw(state.w, "sign", carry.generator, copies=2)[0]
        if bool(noise[0] == noise[1]):
            noticed += 1
            with pytest.warns(mo.ZeroHypergradientWarning, match="identical"):
                assert float(mo.hypergradient(*args, estimator=estimator).total) == 0
        else:
            assert float(mo.hypergradient(*args, estimator=estimator).total) != 0
    assert 0 < noticed < 16


@pytest.mark.parametrize("estimator", RANDOM, ids=lambda e: type(e).__name__)
def test_meta_batch(estimator):
    """Two stacked tasks: with the methods' noise in λ, shared by the tasks, the result is the sum over tasks."""
    one = small_problem()
    stacked = mo.inner_step(mo.vmapped(one.step.inner_loss), mo.optim.SGD(lr=0.1))
    outer = mo.vmapped(lambda w, lam, _: one.outer(w, lam, None))
    w = {name: torch.stack([value, 0.5 * value]) for name, value in one.w.items()}
    batches = [torch.stack([x, x + 1]) for x in one.batches]
    together = mo.hypergradient(
        stacked, outer, mo.Stacked(w), one.lam, batches, torch.zeros(2), estimator=estimator
    ).total
    if isinstance(estimator, (mo.EvoGrad, mo.UORO)):  # noise in the weights: another draw
        assert mo.tree.is_finite(together)
        return
    first = gradient(one, estimator).total
    second = gradient(one._replace(w=mo.tree.scale(0.5, one.w), batches=[x + 1 for x in one.batches]), estimator).total
    torch.testing.assert_close(flat(together), flat(first) + flat(second), rtol=1e-8, atol=1e-10)
