"""What must hold exactly, whatever the problem: the limits in which one method becomes another."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import close

import metaopt as mo
from metaopt import tree
from metaopt.estimators.base import FinishedRun

F64 = torch.float64
SEEDS = st.integers(0, 10_000)
HORIZONS = st.integers(1, 6)
OPTIMIZERS = [
    mo.optim.SGD(lr=0.1),
    mo.optim.SGD(lr=0.1, momentum=0.9, weight_decay=0.01),
    mo.optim.SGD(lr=lambda lam, t: 0.1 * lam["rate"].exp() / t, momentum=0.5, nesterov=True),
]


class Problem:
    """A small tanh network: weights and hyperparameters are pytrees, and the outer loss sees λ directly."""

    def __init__(self, seed, T, optimizer):
        g = torch.Generator().manual_seed(seed)

        def randn(*shape):
            return torch.randn(*shape, generator=g, dtype=F64)

        self.w0 = {"a": randn(3, 2), "b": [randn(2)]}
        self.lam = {"warp": 0.5 * randn(2, 2), "rate": 0.1 * randn(())}
        self.batches = [(randn(4, 3), randn(4)) for _ in range(T)]
        self.outer_batch = (randn(5, 3), randn(5))
        self.step = mo.inner_step(self.loss, optimizer)

    @staticmethod
    def loss(w, lam, batch):
        x, y = batch
        return (((x @ w["a"]).tanh() @ lam["warp"].tanh() @ w["b"][0] - y) ** 2).mean()

    def outer_loss(self, w, lam, batch):
        return self.loss(w, lam, batch) + 0.1 * (lam["rate"] ** 2 + (lam["warp"] ** 3).sum())

    def by(self, estimator):
        return mo.hypergradient(
            self.step, self.outer_loss, self.w0, self.lam, self.batches, self.outer_batch, estimator=estimator
        )

    def by_autograd(self):
        w = tree.attach(self.w0)
        lam = tree.attach(self.lam)
        state = self.step.init(w, lam)._replace(w=w)
        for batch in self.batches:
            state = self.step(state, lam, batch)
        loss = self.outer_loss(state.w, lam, self.outer_batch)
        flat = torch.autograd.grad(loss, tree.leaves(lam) + tree.leaves(w))
        return tree.unflatten(flat[:2], tree.flatten(lam)[1]), tree.unflatten(flat[2:], tree.flatten(w)[1])


optimizers = pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=["plain", "momentum", "schedule"])


@optimizers
@given(seed=SEEDS, T=HORIZONS)
def test_rmd_is_autograd_through_the_loop(optimizer, seed, T):
    problem = Problem(seed, T, optimizer)
    lam_bar, w_bar = problem.by_autograd()
    hg = problem.by(mo.RMD())
    assert close(hg.total, lam_bar)
    assert close(hg.initial, w_bar)
    assert close(hg.total, tree.add(hg.direct, hg.indirect))


@optimizers
@given(seed=SEEDS, T=HORIZONS)
def test_truncated_runs_from_first_order_over_one_step_to_rmd(optimizer, seed, T):
    problem = Problem(seed, T, optimizer)
    rmd = problem.by(mo.RMD())
    assert close(problem.by(mo.TruncatedRMD(T)).total, rmd.total)
    assert close(problem.by(mo.TruncatedRMD(T + 3)).initial, rmd.initial)
    assert close(problem.by(mo.TruncatedRMD(1)).total, problem.by(mo.OneStep()).total)
    assert close(problem.by(mo.TruncatedRMD(0)).total, problem.by(mo.FirstOrder()).total)
    assert close(problem.by(mo.FirstOrder()).total, rmd.direct)
    if T > 1:
        assert problem.by(mo.OneStep()).initial is None


@optimizers
@given(seed=SEEDS)
def test_with_one_step_every_sweep_is_rmd(optimizer, seed):
    problem = Problem(seed, 1, optimizer)
    rmd = problem.by(mo.RMD()).total
    for estimator in (mo.DrMAD(), mo.OneStep(), mo.HyperDistill(gamma=0.9, theta=1.0)):
        assert close(problem.by(estimator).total, rmd)


@given(seed=SEEDS, T=HORIZONS, theta=st.floats(0.1, 3.0))
def test_hyperdistill_without_memory_is_one_step_up_to_its_size(seed, T, theta):
    problem = Problem(seed, T, OPTIMIZERS[1])
    one_step = problem.by(mo.OneStep()).indirect
    assert close(problem.by(mo.HyperDistill(gamma=0.0, theta=theta)).indirect, tree.scale(theta, one_step))
    assert close(problem.by(mo.HyperDistill(gamma=0.0, theta=theta, pi="plain")).indirect, one_step)
    unit = problem.by(mo.HyperDistill(gamma=0.0, theta=theta, pi="unit")).indirect
    assert float(tree.norm(unit)) == pytest.approx(1.0)


@pytest.mark.parametrize("gamma", [0.3, 0.9, 1.0])
@given(seed=SEEDS)
def test_drmad_is_exact_where_the_jacobians_are_constant(gamma, seed):
    """Quadratic inner loss, λ linear in it: A and B do not depend on w."""
    g = torch.Generator().manual_seed(seed)
    h = torch.rand(3, generator=g, dtype=F64) + 0.5
    c = torch.randn(3, generator=g, dtype=F64)
    step = mo.inner_step(
        lambda w, lam, b: 0.5 * (h * (w - lam - b) ** 2).sum(), mo.optim.SGD(lr=0.2, momentum=0.5 * gamma)
    )
    batches = [torch.randn(3, generator=g, dtype=F64) for _ in range(5)]
    args = (
        step,
        lambda w, lam, b: (w**3 * c).sum(),
        torch.randn(3, generator=g, dtype=F64),
        torch.randn(3, generator=g, dtype=F64),
        batches,
        None,
    )
    assert close(mo.hypergradient(*args, estimator=mo.DrMAD()).total, mo.hypergradient(*args, estimator=mo.RMD()).total)


@given(seed=SEEDS, T=st.integers(1, 8))
def test_hyperdistill_is_exact_at_every_t_on_the_isotropic_case(seed, T):
    """L = h/2 |w - a|² + λ/2 |w|², γ = 1 - η(h + λ): θ is fitted to 1, and the hypergradient is exact at every t (methods, case 7)."""
    g = torch.Generator().manual_seed(seed)
    h = 1.3
    eta = 0.2
    lam = torch.rand((), generator=g, dtype=F64) + 0.1
    a, w0, c = (torch.randn(4, generator=g, dtype=F64) for _ in range(3))
    step = mo.inner_step(
        lambda w, lam, b: 0.5 * h * ((w - a) ** 2).sum() + 0.5 * lam * (w**2).sum(), mo.optim.SGD(lr=eta)
    )
    outer = lambda w, lam, b: ((w - c) ** 2).sum()  # noqa: E731
    gamma = float(1 - eta * (h + lam))
    first = state = step.init(w0, lam)
    for _ in range(T):
        state = step(state, lam, None)
    fitted = mo.HyperDistill(gamma=gamma).calibrate(step, lam, FinishedRun(first, state, [None] * T, 2 * (state.w - c)))
    assert fitted.theta == pytest.approx(1.0, abs=1e-10)
    for t in range(1, T + 1):
        args = (step, outer, w0, lam, [None] * t, None)
        assert close(mo.hypergradient(*args, estimator=fitted).total, mo.hypergradient(*args, estimator=mo.RMD()).total)


@given(seed=SEEDS, K=st.integers(1, 6))
def test_at_convergence_truncated_rmd_is_a_neumann_series(seed, K):
    g = torch.Generator().manual_seed(seed)
    m = torch.randn(3, 3, generator=g, dtype=F64)
    H = m @ m.T / 3 + torch.eye(3, dtype=F64)
    lam = torch.randn(3, generator=g, dtype=F64)
    c = torch.randn(3, generator=g, dtype=F64)
    eta = 0.1
    step = mo.inner_step(
        lambda w, lam, b: 0.5 * (w - lam) @ H @ (w - lam) + 0.1 * (lam * w).sum(), mo.optim.SGD(lr=eta)
    )
    solution = lam - 0.1 * torch.linalg.solve(H, lam)
    args = (step, lambda w, lam, b: (w * c).sum() + (w**2).sum(), solution, lam, [None] * 6, None)
    truncated = mo.hypergradient(*args, estimator=mo.TruncatedRMD(K)).total
    assert close(mo.hypergradient(*args, estimator=mo.IFT(mo.linsolve.Neumann(K - 1), solved=None)).total, truncated)


@given(seed=SEEDS, tasks=st.integers(1, 4))
@pytest.mark.parametrize("stacked", [mo.vmapped, mo.looped])
@pytest.mark.parametrize(
    "estimator", [mo.RMD(), mo.OneStep(), mo.DrMAD(), mo.TruncatedRMD(2)], ids=lambda e: type(e).__name__
)
def test_a_stacked_meta_batch_is_the_loop_over_tasks(estimator, stacked, seed, tasks):
    problems = [Problem(seed + i, 3, OPTIMIZERS[1]) for i in range(tasks)]
    first = problems[0]
    stacked_step = mo.inner_step(stacked(Problem.loss), OPTIMIZERS[1])
    w0 = mo.Stacked(tree.stack([p.w0 for p in problems]))
    batches = [tree.stack([p.batches[t] for p in problems]) for t in range(3)]
    outer_batch = tree.stack([p.outer_batch for p in problems])
    together = mo.hypergradient(
        stacked_step, stacked(first.outer_loss), w0, first.lam, batches, outer_batch, estimator=estimator
    )
    alone = [
        mo.hypergradient(p.step, first.outer_loss, p.w0, first.lam, p.batches, p.outer_batch, estimator=estimator).total
        for p in problems
    ]
    total = alone[0]
    for one in alone[1:]:
        total = tree.add(total, one)
    assert close(together.total, total)


def test_a_meta_batch_names_what_has_no_task_axis():
    loss = mo.looped(lambda w, lam, batch: (w["a"] * batch).sum())
    with pytest.raises(ValueError, match=r"\['b'\] has shape \(2,\)"):
        loss({"a": torch.ones(3, 2), "b": torch.ones(2)}, None, torch.ones(3, 2))


@given(seed=SEEDS, scale=st.floats(-2.0, 2.0))
@pytest.mark.parametrize(
    "estimator",
    [mo.RMD(), mo.OneStep(), mo.DrMAD(), mo.TruncatedRMD(2), mo.HyperDistill(gamma=0.5)],
    ids=lambda e: type(e).__name__,
)
def test_the_pullback_is_linear_in_alpha(estimator, seed, scale):
    problem = Problem(seed, 3, OPTIMIZERS[1])
    state = problem.step.init(problem.w0, problem.lam)
    carry = estimator.init(problem.step, state, problem.lam)
    for batch in problem.batches:
        state, carry = estimator.advance(problem.step, state, problem.lam, batch, carry)
    _, pullback = estimator.respond(problem.step, state, problem.lam, carry)
    a = tree.map(torch.randn_like, state.w)
    b = tree.map(torch.randn_like, state.w)
    of_sum = pullback(tree.add(a, tree.scale(scale, b))).lam
    sum_of = tree.add(pullback(a).lam, tree.scale(scale, pullback(b).lam))
    assert close(tree.filled(of_sum, problem.lam), tree.filled(sum_of, problem.lam), 1e-9)


# -- replay --------------------------------------------------------------------------------------
def dropout_problem():
    module = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1)
    ).double()
    model = mo.functional(module)
    x = torch.randn(6, 4, dtype=F64)
    y = torch.randn(6, 1, dtype=F64)
    step = mo.inner_step(
        lambda w, lam, b: lam.exp() * ((model(w, x) - y) ** 2).mean(), mo.optim.SGD(lr=0.1, momentum=0.9)
    )
    return module, model, step, lambda w, lam, b: (model.eval()(w, x) - y).pow(2).mean() * lam


def test_dropout_is_replayed_exactly():
    _, model, step, outer = dropout_problem()
    lam = torch.tensor(0.3, dtype=F64)
    torch.manual_seed(5)
    hg = mo.hypergradient(step, outer, model.params, lam, [None] * 5, None, estimator=mo.RMD())
    after = torch.get_rng_state()
    torch.manual_seed(5)
    leaf = lam.clone().requires_grad_()
    state = step.init(model.params, lam)
    for _ in range(5):
        state = step(state, leaf, None)
    assert torch.equal(torch.get_rng_state(), after)  # the sweep has drawn nothing of its own
    expected = torch.autograd.grad(outer(state.w, leaf, None), leaf)[0]
    assert close(hg.total, expected, 1e-12)
    torch.manual_seed(6)
    other = mo.hypergradient(step, outer, model.params, lam, [None] * 5, None, estimator=mo.RMD())
    assert not close(other.total, expected, 1e-3)  # the masks do matter


@pytest.mark.parametrize(
    "estimator",
    [
        mo.RMD(),
        mo.OneStep(),
        mo.DrMAD(),
        mo.IFT(mo.linsolve.Neumann(2), converged=None, solved=None),
        mo.HyperDistill(),
    ],
    ids=lambda e: type(e).__name__,
)
def test_nothing_of_the_users_is_mutated(estimator):
    module, model, step, outer = dropout_problem()
    before = {name: p.clone() for name, p in module.named_parameters()}
    lam = torch.tensor(0.3, dtype=F64)
    w0 = {name: p.clone() for name, p in model.params.items()}
    mo.hypergradient(step, outer, w0, lam, [None] * 3, None, estimator=estimator)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in module.named_parameters())
    assert all(torch.equal(p, before[name]) and not p.requires_grad for name, p in w0.items())
    assert lam.item() == 0.3
    assert not lam.requires_grad
