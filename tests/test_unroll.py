"""unroll: one autograd node whose gradients are the estimator's; against autograd through the loop."""

import pytest
import torch
from torch import nn

import metaopt as mo
from metaopt import tree

T = 4


def problem():
    torch.manual_seed(2)
    lam = {"scale": torch.rand(3, dtype=torch.float64), "lr": torch.tensor(0.1, dtype=torch.float64)}
    w0 = torch.randn(3, dtype=torch.float64)
    batches = [torch.randn(3, dtype=torch.float64) for _ in range(T)]
    teacher = torch.randn(3, dtype=torch.float64)
    return w0, lam, batches, teacher


def make(teacher):
    def loss(w, lam, batch):
        return ((w * batch).tanh() - lam["scale"] * teacher).pow(2).sum()

    return mo.inner_step(loss, mo.optim.SGD(lr=lambda lam, t: lam["lr"], momentum=0.5))


def through_the_loop(step, w0, lam, batches):
    state = mo.InnerState(w0, {"momentum": torch.zeros_like(w0)}, 0)
    for batch in batches:
        state = step(state, lam, batch)
    return state


def leaves_of(w0, lam, teacher):
    return [w0.requires_grad_(), *[x.requires_grad_() for x in lam.values()], teacher.requires_grad_()]


@pytest.mark.parametrize(
    "trajectory",
    [mo.trajectory.Full(), mo.trajectory.Graphs(), mo.trajectory.Checkpointed(2)],
    ids=lambda t: type(t).__name__,
)
def test_gradients_are_those_of_autograd_through_the_loop(trajectory):
    w0, lam, batches, teacher = problem()
    inputs = leaves_of(w0, lam, teacher)
    expected_state = through_the_loop(make(teacher), w0, lam, batches)
    expected = torch.autograd.grad(expected_state.w.pow(3).sum() + lam["scale"].sum(), inputs)
    state = mo.unroll(make(teacher), w0, lam, batches, estimator=mo.RMD(trajectory), closed_over=[teacher])
    assert torch.equal(state.w, expected_state.w) and state.t == T
    got = torch.autograd.grad(state.w.pow(3).sum() + lam["scale"].sum(), inputs)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() < 1e-12 and a.abs().max() > 1e-6


def test_a_closed_over_module_and_what_was_computed_before():
    w0, lam, batches, _ = problem()
    net = nn.Linear(2, 3).double()
    x = torch.randn(2, dtype=torch.float64)
    root = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    step = mo.inner_step(lambda w, lam, b: ((w - net(x) * b) ** 2).sum() * lam["scale"].sum(), mo.optim.SGD(lr=0.05))
    computed = {"scale": root * lam["scale"], "lr": lam["lr"]}
    inputs = [root, *net.parameters()]
    expected = torch.autograd.grad(
        through_the_loop(step, w0.requires_grad_(), computed, batches).w.sum(), inputs, retain_graph=True
    )
    got = torch.autograd.grad(
        mo.unroll(step, w0, computed, batches, closed_over=list(net.parameters())).w.sum(), inputs
    )
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(got, expected, strict=True))


def test_an_undeclared_tensor_is_spoken_of():
    w0, lam, batches, teacher = problem()
    lam["scale"].requires_grad_()
    with pytest.warns(mo.UndeclaredTensorWarning, match=r"1 tensor.*\(3,\).*closed_over"):
        mo.unroll(make(teacher.requires_grad_()), w0, lam, batches)


@pytest.mark.parametrize("estimator", [mo.DrMAD(), mo.TruncatedRMD(2), mo.OneStep()], ids=lambda e: type(e).__name__)
def test_any_estimator_and_its_own_number(estimator):
    w0, lam, batches, teacher = problem()
    hg = mo.hypergradient(make(teacher), lambda w, lam, _: w.pow(3).sum(), w0, lam, batches, None, estimator=estimator)
    lam["scale"].requires_grad_()
    mo.unroll(make(teacher), w0, lam, batches, estimator=estimator).w.pow(3).sum().backward()
    assert lam["scale"].grad.abs().sum() > 0 and lam["lr"].grad is None
    assert torch.allclose(lam["scale"].grad, hg.total["scale"], rtol=1e-12)


def test_implicit_differentiation_and_its_own_number():
    w0, lam, batches, teacher = problem()
    step = mo.inner_step(lambda w, lam, batch: ((w * batch).tanh() - lam * teacher).pow(2).sum(), mo.optim.SGD(lr=0.1))
    estimator = mo.IFT(mo.linsolve.Neumann(3, rate=0.1), converged=None, solved=None)
    scale = lam["scale"].clone()
    hg = mo.hypergradient(step, lambda w, lam, _: w.pow(3).sum(), w0, scale, batches, None, estimator=estimator)
    mo.unroll(step, w0, scale.requires_grad_(), batches, estimator=estimator, closed_over=[teacher]).w.pow(
        3
    ).sum().backward()
    assert scale.grad.abs().sum() > 0
    assert torch.allclose(scale.grad, hg.total, rtol=1e-12)


def test_no_grad_and_nothing_to_differentiate_are_plain_runs():
    w0, lam, batches, teacher = problem()
    frozen = mo.unroll(make(teacher), w0, lam, batches)
    assert not frozen.w.requires_grad
    leaves_of(w0, lam, teacher)
    with torch.no_grad():
        quiet = mo.unroll(make(teacher), w0, lam, batches)
    assert not quiet.w.requires_grad and torch.equal(quiet.w, frozen.w)


def test_double_use():
    w0, lam, batches, teacher = problem()
    lam["scale"].requires_grad_()
    state = mo.unroll(make(teacher), w0, lam, batches)
    a = torch.autograd.grad(state.w.sum(), lam["scale"], retain_graph=True)[0]
    b = torch.autograd.grad(2 * state.w.sum(), lam["scale"])[0]
    assert torch.allclose(2 * a, b, rtol=1e-12)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(state.w.sum(), lam["scale"])
    state = mo.unroll(make(teacher), w0, lam, batches)
    with pytest.raises(RuntimeError, match="no second derivative: leave out create_graph"):
        torch.autograd.grad(state.w.pow(2).sum() + lam["scale"].pow(3).sum(), lam["scale"], create_graph=True)


def test_initial_weights_without_a_cotangent():
    w0, lam, batches, teacher = problem()
    leaves_of(w0, lam, torch.zeros(1))
    state = mo.unroll(make(teacher), w0, lam, batches, estimator=mo.DrMAD())
    with pytest.raises(RuntimeError, match="DrMAD has no cotangent for the initial state"):
        state.w.sum().backward()


def test_lam_changed_in_place_before_the_backward_pass():
    w0, lam, batches, teacher = problem()
    lam["scale"].requires_grad_()
    state = mo.unroll(make(teacher), w0, lam, batches)
    with torch.no_grad():
        lam["scale"].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        state.w.sum().backward()


def test_autocast_is_that_of_the_run():
    net = mo.functional(nn.Linear(3, 2))
    x = torch.randn(5, 3)
    kinds = []

    def loss(w, lam, batch):
        out = net(w, batch)
        kinds.append(out.dtype)
        return (lam * out.float()).pow(2).sum()

    step = mo.inner_step(loss, mo.optim.SGD(lr=0.01))
    lam = torch.ones(2, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = mo.unroll(step, net.params, lam, [x] * 2)
    tree.norm(state.w).backward()
    assert set(kinds) == {torch.bfloat16} and lam.grad.abs().sum() > 0


def test_random_numbers_are_replayed():
    net = mo.functional(nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2)).double())
    w0 = net.params
    lam = torch.ones(2, dtype=torch.float64, requires_grad=True)
    step = mo.inner_step(lambda w, lam, x: (lam * net(w, x)).pow(2).sum(), mo.optim.SGD(lr=0.01))
    xs = [torch.randn(5, 3, dtype=torch.float64) for _ in range(3)]
    torch.manual_seed(0)
    got = torch.autograd.grad(tree.norm(mo.unroll(step, w0, lam, xs).w), lam)[0]
    torch.manual_seed(0)
    state = mo.InnerState({k: v.requires_grad_() for k, v in w0.items()}, {}, 0)
    for x in xs:
        state = step(state, lam, x)
    expected = torch.autograd.grad(tree.norm(state.w), lam)[0]
    assert (got - expected).abs().max() < 1e-12


def test_bad_input_is_named():
    w0, _, batches, teacher = problem()
    with pytest.raises(ValueError, match="hyperparameters are floating-point"):
        mo.unroll(make(teacher), w0, {"n": 3}, batches)
    with pytest.raises(TypeError, match="closed-over tensors"):
        mo.inner.closed_over(object(), [teacher])


def test_a_pullback_that_is_not_linear_is_refused():
    w0, lam, batches, teacher = problem()
    lam["scale"].requires_grad_()
    with pytest.raises(ValueError, match=r"pi='unit'.*not linear"):
        mo.unroll(make(teacher), w0, lam, batches, estimator=mo.HyperDistill(pi="unit"))
    assert mo.unroll(make(teacher), w0, lam, batches, estimator=mo.HyperDistill(pi="plain")).w.requires_grad


@pytest.mark.parametrize("chunked", [False, True], ids=["steps", "chunks"])
def test_hoisted_features_are_the_whole_net(chunked):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(2, 4), nn.Tanh()).double()
    head = mo.functional(nn.Linear(4, 1).double())
    (x, y), (x_val, y_val) = [
        (torch.randn(5, 2, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64)) for _ in range(2)
    ]
    lam = dict(body.named_parameters())
    optimizer = mo.optim.Adam(lr=0.1)

    def loss(w, lam, batch):
        return (head(w, torch.func.functional_call(body, lam, (batch[0],))) - batch[1]).pow(2).mean()

    def head_loss(w, features, y):
        return (head(w, features) - y).pow(2).mean()

    whole = mo.hypergradient(
        mo.inner_step(loss, optimizer),
        loss,
        head.params,
        tree.detach(lam),
        [(x, y)] * T,
        (x_val, y_val),
        estimator=mo.RMD(),
    ).total
    step = mo.inner_step(head_loss, optimizer)
    batches = [y] * T
    if chunked:
        step = mo.inner.chunked(step)
        batches = mo.inner.in_chunks(batches, 3)
    w = mo.unroll(step, head.params, body(x), batches).w
    head_loss(w, body(x_val), y_val).backward()
    for name, leaf in lam.items():
        assert torch.allclose(leaf.grad, whole[name], rtol=1e-12)
        assert leaf.grad.abs().sum() > 0
