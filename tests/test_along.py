"""Runs that go on from a state, several outer losses along one run, and what shapes the first state."""

import pytest
import torch
from cases import OPTIMIZERS, TRAJECTORIES, ids

import metaopt as mo
from metaopt import tree

F64 = torch.float64
T = 7
AT = (2, 3, 7)


def inner_loss(w, lam, x):
    return (((x @ w["a"]).tanh() - w["b"]) ** 2).mean() + lam["decay"].exp() * sum((v**2).sum() for v in w.values())


def outer_loss(w, lam, x):
    return (x @ w["a"]).sin().mean() + (lam["decay"] * w["b"]).sum()


def problem():
    torch.manual_seed(0)
    w0 = {"a": torch.randn(3, 2, dtype=F64), "b": torch.randn(2, dtype=F64)}
    lam = {"decay": torch.tensor(-1.0, dtype=F64)}
    return w0, lam, [torch.randn(5, 3, dtype=F64) for _ in range(T)]


def by_autograd(step, w0, lam, batches, at):
    """Sum of the outer losses of the steps ``at``, and its gradient, through the plain loop."""
    w0 = tree.attach(w0)
    lam = tree.attach(lam)
    state = step.init(w0, lam)
    total = torch.zeros((), dtype=F64)
    for t, batch in enumerate(batches, 1):
        state = step(state, lam, batch)
        if t in at:
            total = total + outer_loss(state.w, lam, batch)
    gradients = torch.autograd.grad(total, [*tree.leaves(lam), *tree.leaves(w0)])
    return total.detach(), gradients


SGD = mo.optim.SGD(lr=0.1, momentum=0.9)


@pytest.mark.parametrize("case", [c for c in TRAJECTORIES if c.full], ids=lambda c: c.name)
def test_losses_along_the_run_take_one_sweep(case):
    w0, lam, batches = problem()
    step = mo.inner_step(inner_loss, SGD)
    loss, expected = by_autograd(step, w0, lam, batches, AT)
    hg = mo.hypergradient(
        step,
        outer_loss,
        w0,
        lam,
        batches,
        [batches[t - 1] for t in AT],
        estimator=mo.RMD(case.make(T)),
        at=AT,
    )
    fixed_point = case.name == "Reversible"
    torch.testing.assert_close(hg.outer_loss, loss, rtol=1e-8 if fixed_point else 1e-12, atol=0)
    found = [*tree.leaves(hg.total), *tree.leaves(hg.initial)]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6 if fixed_point else 1e-10, atol=1e-10)
    assert hg.cost.products <= 2 * T


def test_the_sum_of_fifty_losses_takes_no_more_products_than_one():
    w0, lam, _ = problem()
    batches = [torch.randn(5, 3, dtype=F64) for _ in range(50)]
    step = mo.inner_step(inner_loss, SGD)
    at = range(1, 51)
    hg = mo.hypergradient(step, outer_loss, w0, lam, batches, batches, at=at)
    assert hg.cost.products == 2 * 50
    _, expected = by_autograd(step, w0, lam, batches, at)
    torch.testing.assert_close(hg.total["decay"], expected[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "estimator", [mo.FMD(), mo.OneStep(), mo.TruncatedRMD(2), mo.DrMAD(), mo.FirstOrder()], ids=repr
)
def test_other_estimators_respond_at_each_step(estimator):
    w0, lam, batches = problem()
    step = mo.inner_step(inner_loss, SGD)
    hg = mo.hypergradient(step, outer_loss, w0, lam, batches, [batches[t - 1] for t in AT], estimator=estimator, at=AT)
    parts = [
        mo.hypergradient(step, outer_loss, w0, lam, batches[:t], batches[t - 1], estimator=estimator).total for t in AT
    ]
    torch.testing.assert_close(hg.total["decay"], sum(part["decay"] for part in parts), rtol=1e-10, atol=1e-12)


def test_states_along_the_run_of_an_estimator_that_answers_for_whole_runs_are_refused():
    w0, lam, batches = problem()
    with pytest.raises(ValueError, match="answers for a whole run"):
        mo.unroll(mo.inner_step(inner_loss, SGD), w0, tree.attach(lam), batches, estimator=mo.DrMAD(), at=AT)


def test_an_estimator_along_one_outer_loss_refuses_several():
    w0, lam, batches = problem()
    step = mo.inner_step(inner_loss, SGD)
    with pytest.raises(ValueError, match="follows one outer loss"):
        mo.hypergradient(step, outer_loss, w0, lam, batches, batches[:3], estimator=mo.SOBA(), at=AT)


@pytest.mark.parametrize("at", [(), (0, 1), (3, 2), (2, 2), (1, 8), (1.5,)])
def test_steps_that_do_not_exist_are_refused(at):
    w0, lam, batches = problem()
    step = mo.inner_step(inner_loss, SGD)
    with pytest.raises(ValueError, match="at"):
        mo.hypergradient(step, outer_loss, w0, lam, batches, batches[: len(at)], at=at)
    for given in (lam, tree.attach(lam)):
        with pytest.raises(ValueError, match="at"):
            mo.unroll(step, w0, given, batches, at=at)


@pytest.mark.parametrize("case", [c for c in TRAJECTORIES if c.full and c.name != "Reversible"], ids=lambda c: c.name)
def test_unrolled_states_along_the_run_are_differentiable(case):
    w0, lam, batches = problem()
    step = mo.inner_step(inner_loss, SGD)
    _, expected = by_autograd(step, w0, lam, batches, AT)
    w0 = tree.attach(w0)
    lam = tree.attach(lam)
    states = mo.unroll(step, w0, lam, batches, estimator=mo.RMD(case.make(T)), at=AT)
    total = sum(outer_loss(state.w, lam, batches[t - 1]) for state, t in zip(states, AT, strict=True))
    found = torch.autograd.grad(total, [*tree.leaves(lam), *tree.leaves(w0)])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", OPTIMIZERS, ids=ids(OPTIMIZERS))
def test_chained_runs_are_one_run(case):
    if case.name.startswith("Muon"):
        return  # refuses vectors, which is tested with it
    w0, lam, batches = problem()
    step = mo.inner_step(inner_loss, case.make())
    whole_w0 = tree.attach(w0)
    whole_lam = tree.attach(lam)
    whole = mo.unroll(step, whole_w0, whole_lam, batches)
    chained_w0 = tree.attach(w0)
    chained_lam = tree.attach(lam)
    state = mo.unroll(step, chained_w0, chained_lam, batches[:3])
    chained = mo.unroll(step, state, chained_lam, batches[3:])
    assert chained.t == whole.t == T + case.make().steps_taken
    results = []
    for final, w, hyper in ((whole, whole_w0, whole_lam), (chained, chained_w0, chained_lam)):
        total = sum((x**2).sum() for x in tree.floats(final) if x.requires_grad)  # weights and slots
        results.append([total, *torch.autograd.grad(total, [*tree.leaves(hyper), *tree.leaves(w)])])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("estimator", [mo.RMD(), mo.FMD(), mo.OneStep(), mo.DrMAD()], ids=repr)
def test_hypergradient_goes_on_from_a_state(estimator):
    w0, lam, batches = problem()
    step = mo.inner_step(inner_loss, SGD)
    state = step.init(w0, lam)
    for batch in batches[:3]:
        state = step(state, lam, batch)
    hg = mo.hypergradient(step, outer_loss, state, lam, batches[3:], batches[0], estimator=estimator)
    lam_ = tree.attach(lam)
    final = state
    for batch in batches[3:]:
        final = step(final, lam_, batch)
    assert hg.state.t == T
    torch.testing.assert_close(hg.state.w, tree.detach(final.w))
    if estimator.exact:
        (expected,) = torch.autograd.grad(outer_loss(final.w, lam_, batches[0]), lam_["decay"])
        torch.testing.assert_close(hg.total["decay"], expected, rtol=1e-10, atol=1e-12)


def test_an_average_of_the_weights_is_differentiable():
    w0, lam, batches = problem()
    step = mo.inner_step(inner_loss, mo.optim.EMA(SGD, decay=0.8))
    lam_ = tree.attach(lam)
    found = torch.autograd.grad(mo.unroll(step, w0, lam_, batches).slots["average"]["a"].sum(), lam_["decay"])
    state = step.init(w0, lam_)
    for batch in batches:
        state = step(state, lam_, batch)
    expected = torch.autograd.grad(state.slots["average"]["a"].sum(), lam_["decay"])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


def test_a_state_of_another_optimiser_is_refused():
    w0, lam, batches = problem()
    state = mo.inner_step(inner_loss, mo.optim.Adam(lr=0.1)).init(w0, lam)
    step = mo.inner_step(inner_loss, SGD)
    for call in (
        lambda: mo.unroll(step, state, tree.attach(lam), batches),
        lambda: mo.hypergradient(step, outer_loss, state, lam, batches, batches[0]),
    ):
        with pytest.raises(ValueError, match="slots of the state given as w0"):
            call()


# -- a first state that depends on λ -----------------------------------------------------------------
def leaky():
    return mo.custom_step(
        lambda state, lam, x: state._replace(w=0.5 * state.w + lam * x + 0.1 * state.slots, slots=state.slots.sin()),
        init=lambda w, lam: mo.InnerState(w * lam, lam**2 * torch.ones_like(w)),
    )


@pytest.mark.parametrize(
    "estimator", [mo.RMD(), mo.RMD(mo.trajectory.Graphs()), mo.RMD(mo.trajectory.Checkpointed(2))], ids=repr
)
def test_what_shapes_the_first_state_is_taken_in(estimator):
    step = leaky()
    w0 = torch.ones(3, dtype=F64)
    batches = [torch.randn(3, dtype=F64) for _ in range(4)]
    lam = torch.tensor(0.3, dtype=F64)
    hg = mo.hypergradient(step, lambda w, lam, _: (w**2).sum(), w0, lam, batches, None, estimator=estimator)
    w_ = tree.attach(w0)
    lam_ = tree.attach(lam)
    state = step.init(w_, lam_)
    for batch in batches:
        state = step(state, lam_, batch)
    by_lam, by_w0 = torch.autograd.grad((state.w**2).sum(), [lam_, w_])
    torch.testing.assert_close(hg.total, by_lam, rtol=1e-12, atol=0)
    torch.testing.assert_close(hg.initial, by_w0, rtol=1e-12, atol=0)
    w_ = tree.attach(w0)
    lam_ = tree.attach(lam)
    loss = (mo.unroll(step, w_, lam_, batches, estimator=estimator).w ** 2).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, [lam_, w_]), (by_lam, by_w0), rtol=1e-12, atol=0)


def test_an_estimator_that_cannot_see_it_says_so():
    arguments = leaky(), lambda w, lam, _: (w**2).sum(), torch.ones(3, dtype=F64), torch.tensor(0.3, dtype=F64)
    batches = [torch.ones(3, dtype=F64)] * 4
    with pytest.raises(ValueError, match="lam shapes the initial state"):
        mo.hypergradient(*arguments, batches, None, estimator=mo.FMD())
    with pytest.warns(UserWarning, match="lam shapes the initial state"):
        mo.hypergradient(*arguments, batches, None, estimator=mo.DrMAD())


# -- initial weights alone ---------------------------------------------------------------------------
def test_there_may_be_no_lam_where_initial_weights_learn():
    w0, _, batches = problem()
    step = mo.inner_step(lambda w, lam, x: ((x @ w["a"]).tanh() - w["b"]).pow(2).mean(), SGD)

    def outer(w, lam, x):
        return (x @ w["a"]).sum()

    hg = mo.hypergradient(step, outer, w0, None, batches, batches[0])
    w_ = tree.attach(w0)
    state = step.init(w_, None)
    for batch in batches:
        state = step(state, None, batch)
    expected = torch.autograd.grad(outer(state.w, None, batches[0]), tree.leaves(w_))
    for ours, theirs in zip(tree.leaves(hg.initial), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="since FMD has no gradient of initial weights"):
        mo.hypergradient(step, outer, w0, None, batches, batches[0], estimator=mo.FMD())


def test_first_order_initial_gradients_are_those_of_fomaml():
    w0, lam, batches = problem()
    step = mo.inner_step(inner_loss, mo.optim.SGD(lr=0.1))
    w_ = tree.attach(w0)
    final = mo.unroll(step, w_, lam, batches, estimator=mo.FirstOrder())
    found = torch.autograd.grad(outer_loss(final.w, lam, batches[0]), tree.leaves(w_))
    last = tree.attach(tree.detach(final.w))
    expected = torch.autograd.grad(outer_loss(last, lam, batches[0]), tree.leaves(last))
    torch.testing.assert_close(found, expected)


# -- around unroll -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "transform",
    [
        lambda run, lam: torch.func.jacrev(run)(lam),
        lambda run, lam: torch.func.grad(lambda x: run(x).sum())(lam),
        lambda run, lam: torch.func.jvp(run, (lam,), (torch.ones_like(lam),)),
        lambda run, lam: torch.vmap(run)(torch.stack([lam, lam])),
        lambda run, lam: torch.autograd.functional.hessian(lambda x: run(x).sum() + x.pow(3).sum(), lam),
    ],
    ids=["jacrev", "grad", "jvp", "vmap", "hessian"],
)
def test_transforms_around_unroll_are_refused_with_the_remedy(transform):
    w0, _, batches = problem()
    step = mo.inner_step(lambda w, lam, x: inner_loss(w, {"decay": lam.sum()}, x), SGD)

    def run(lam):
        return mo.unroll(step, w0, lam, batches).w["b"]

    with pytest.raises(RuntimeError, match=r"(cannot be inside|has no second derivative)"):
        transform(run, torch.tensor([-1.0], dtype=F64))


def test_the_jacobian_of_plain_autograd_is_right():
    w0, lam, batches = problem()
    step = mo.inner_step(lambda w, lam, x: inner_loss(w, {"decay": lam}, x), SGD)
    found = torch.autograd.functional.jacobian(lambda x: mo.unroll(step, w0, x, batches).w["b"], lam["decay"])
    lam_ = lam["decay"].clone().requires_grad_()
    state = step.init(w0, lam_)
    for batch in batches:
        state = step(state, lam_, batch)
    expected = torch.stack([torch.autograd.grad(x, lam_, retain_graph=True)[0] for x in state.w["b"]])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
