"""The traps of differentiating through training: each is computed right, or refused with an error that says what to do."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from cases import OnceDifferentiable
from torch import nn
from torch.utils.checkpoint import checkpoint

import metaopt as mo
from metaopt import tree
from metaopt.inner import _engine

F64 = torch.float64
T = 3


def through_the_loop(step, outer, w0, lam, batches):
    """``(dL/dλ, dL/dw_0)`` by autograd through all steps."""
    w = tree.attach(w0)
    lam = tree.attach(lam)
    state = step.init(w, lam)._replace(w=w)
    for batch in batches:
        state = step(state, lam, batch)
    inputs = tree.leaves(lam) + tree.leaves(w)
    return torch.autograd.grad(outer(state.w, lam, None), inputs)


def agrees(step, outer, w0, lam, batches, tolerance=1e-12):
    torch.manual_seed(7)
    plain = w0.w if isinstance(w0, mo.Stacked) else w0
    expected = through_the_loop(step, outer, plain, lam, batches)
    torch.manual_seed(7)
    hg = mo.hypergradient(step, outer, w0, lam, batches, None, estimator=mo.RMD())
    got = tree.leaves(hg.total) + tree.leaves(hg.initial)
    assert float(tree.norm(hg.indirect)) > 1e-6
    return all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in zip(got, expected, strict=True))


def slope(step, outer, w0, lam, batches, h=1e-5):
    """Central difference of the outer loss in a scalar λ: knows nothing of derivatives."""

    def value(at):
        state = step.init(w0, at)
        for batch in batches:
            state = step(state, at, batch)
        return outer(state.w, at, None)

    return (value(lam + h) - value(lam - h)) / (2 * h)


def scalar_problem(out):
    """λ scales what ``out(w, x)`` gives; weights (4, 3)."""
    g = torch.Generator().manual_seed(0)
    w0 = torch.randn(4, 3, dtype=F64, generator=g)
    xs = [torch.randn(5, 4, dtype=F64, generator=g) for _ in range(T)]
    step = mo.inner_step(lambda w, lam, x: (lam * out(w, x)).pow(2).mean(), mo.optim.SGD(lr=0.1, momentum=0.5))
    return step, lambda w, lam, _: w.pow(3).sum(), w0, torch.tensor(0.7, dtype=F64), xs


# -- operations without a second derivative --------------------------------------------------------
BAGS = torch.tensor([[0, 1, 2], [1, 3, 0]])
WITHOUT = {
    "EmbeddingBag": lambda w, x: F.embedding_bag(BAGS, w, mode="mean").tanh(),
    "cdist": lambda w, x: torch.cdist(x, w.T).pow(2),
    "hardsigmoid": lambda w, x: F.hardsigmoid(x @ w),
    "multi_margin": lambda w, x: F.multi_margin_loss((x @ w).tanh(), torch.tensor([0, 1, 2, 0, 1])),
}


@pytest.mark.parametrize(
    "mode", [mo.inner.ReverseOverReverse(), mo.inner.ForwardOverReverse()], ids=lambda m: type(m).__name__
)
@pytest.mark.parametrize("name", WITHOUT)
@pytest.mark.filterwarnings("ignore:forward over reverse is impossible")
def test_no_second_derivative_is_an_error(name, mode):
    step, outer, w0, lam, xs = scalar_problem(WITHOUT[name])
    step = mo.inner_step(step.inner_loss, step.optimizer, adjoint=mode)
    with pytest.raises(RuntimeError, match=r"no second derivative in either mode.*Use another form"):
        mo.hypergradient(step, outer, w0, lam, xs, None, estimator=mo.RMD())


ONCE = {
    "RMD": mo.RMD(),
    "RMD, Graphs": mo.RMD(mo.trajectory.Graphs()),
    "OneStep": mo.OneStep(),
    "DrMAD": mo.DrMAD(),
    "IFT": mo.IFT(converged=None),
    "HyperDistill": mo.HyperDistill(theta=1.0),
    "FMD": mo.FMD(),
    "ForwardGradient": mo.ForwardGradient(),
}


@pytest.mark.parametrize("name", ONCE)
@pytest.mark.parametrize("kind", ["reverse", "mixed", "custom"])
@pytest.mark.filterwarnings("ignore:forward over reverse is impossible")
def test_an_operation_that_is_differentiable_once_is_an_error(name, kind):
    def loss(w, lam, x):
        return (lam * OnceDifferentiable.apply(x @ w)).pow(2).mean() + lam * w.pow(2).sum()

    def by_hand(state, lam, x):
        g = torch.autograd.grad(loss(state.w, lam, x), state.w, create_graph=True)[0]
        return state._replace(w=state.w - 0.1 * g)

    _, outer, w0, lam, xs = scalar_problem(lambda w, x: x @ w)
    mode = mo.inner.ForwardOverReverse() if kind == "mixed" else mo.inner.ReverseOverReverse()
    step = mo.custom_step(by_hand) if kind == "custom" else mo.inner_step(loss, mo.optim.SGD(lr=0.1), adjoint=mode)
    with pytest.raises(RuntimeError, match="differentiable once only"):
        mo.hypergradient(step, outer, w0, lam, xs, None, estimator=ONCE[name])


FALL_BACK = {
    "huber": lambda w, x: F.huber_loss((x @ w).tanh(), torch.zeros(5, 3, dtype=F64)),
    "soft margin": lambda w, x: F.soft_margin_loss(x @ w, torch.ones(5, 3, dtype=F64)),
    "mse, a target that is closed over": lambda w, x: F.mse_loss((x @ w).tanh(), torch.ones(5, 3, dtype=F64)),
    "GroupNorm": lambda w, x: F.group_norm(x @ torch.cat([w, w.tanh()], 1), 3).pow(3),
    "SiLU": lambda w, x: F.silu(x @ w),
    "grid_sample": lambda w, x: F.grid_sample(
        w.view(1, 1, 4, 3), x[:4, :2].reshape(1, 2, 2, 2).tanh(), align_corners=False
    ),
}


@pytest.mark.parametrize("name", FALL_BACK)
def test_mixed_mode_gives_way_aloud_and_is_right(name):
    step, outer, w0, lam, xs = scalar_problem(FALL_BACK[name])
    step = mo.inner_step(step.inner_loss, step.optimizer, adjoint=mo.inner.ForwardOverReverse())
    with pytest.warns(UserWarning, match="forward over reverse is impossible here"):
        hg = mo.hypergradient(step, outer, w0, lam, xs, None, estimator=mo.RMD())
    assert abs(hg.total) > 1e-4
    assert torch.allclose(hg.total, slope(step, outer, w0, lam, xs), rtol=1e-6)


# -- layers ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("train", [True, False])
def test_spectral_norm_is_differentiated_through_its_power_iterations(conv, train):
    layer = nn.Conv1d(2, 3, 2) if conv else nn.Linear(4, 3)
    model = mo.functional(nn.utils.parametrizations.spectral_norm(layer.double()).train(train))
    x = torch.randn(5, 2, 4, dtype=F64) if conv else torch.randn(5, 4, dtype=F64)
    name = "parametrizations.weight.original"

    def loss(w, lam, x):
        return (lam * model(w, x)).tanh().pow(2).mean()

    step = mo.inner_step(loss, mo.optim.SGD(lr=1.0))

    def outer(w, lam, _):
        return w[name].pow(3).sum()

    w0 = {k: p + 0.3 * torch.randn_like(p) for k, p in model.params.items()}  # far from what u and v were fitted to
    lam = torch.tensor(0.7, dtype=F64)
    hg = mo.hypergradient(step, outer, w0, lam, [x] * T, None, estimator=mo.RMD())
    assert torch.allclose(hg.total, slope(step, outer, w0, lam, [x] * T), rtol=1e-7)
    direction = torch.randn_like(w0[name])
    ends = [
        mo.hypergradient(
            step, outer, {**w0, name: w0[name] + h * direction}, lam, [x] * T, None, estimator=mo.RMD()
        ).outer_loss
        for h in (1e-5, -1e-5)
    ]
    assert torch.allclose((hg.initial[name] * direction).sum(), (ends[0] - ends[1]) / 2e-5, rtol=1e-6)


def test_spectral_norm_keeps_its_values():
    net = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3).double(), n_power_iterations=2)
    model = mo.functional(net)
    x = torch.randn(5, 4, dtype=F64)
    out, buffers = model.with_buffers(model.params, model.buffers, x)
    assert torch.equal(out, net(x))  # moves the module's u and v …
    assert all(torch.equal(b, buffers[k]) for k, b in net.named_buffers())  # … to what with_buffers returned
    assert not torch.equal(
        model.eval(statistics="frozen")(model.params, x), mo.functional(net).eval(statistics="frozen")(model.params, x)
    )  # … and this one's stay
    with pytest.raises(ValueError, match=r"parametrizations\.spectral_norm"):
        mo.functional(nn.utils.spectral_norm(nn.Linear(2, 2)))


def test_recomputing_does_not_move_running_statistics():
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1)).double()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    model = mo.functional(net)
    w0, lam = mo.partition(model.params, ["3.*"])
    captured = {k: v.clone() for k, v in model.buffers.items()}
    step = mo.inner_step(lambda w, lam, x: model(mo.merge(w, lam), x).pow(2).mean(), mo.optim.SGD(lr=0.1))
    xs = [torch.randn(5, 4, dtype=F64) for _ in range(T)]
    assert agrees(step, lambda w, lam, _: step.inner_loss(w, lam, xs[0]), w0, lam, xs)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(torch.equal(v, captured[k]) for k, v in model.buffers.items())
    assert torch.equal(
        model(model.params, xs[0]), net(xs[0])
    )  # with statistics left out, the output is the same to the bit


# -- vmap --------------------------------------------------------------------------------------------
def test_captured_running_statistics_under_vmap():
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    model = mo.functional(net)
    w = mo.replicated(model.params, 2).w
    x = torch.randn(2, 5, 4, dtype=F64)
    together = torch.vmap(model)(w, x)  # nobody asks for the statistics: they are left out
    assert torch.allclose(together, torch.stack([model(model.params, one) for one in x]), atol=1e-14)
    y, after = torch.vmap(lambda w, x: model.with_buffers(w, model.buffers, x))(w, x)  # one set, moved by each task
    for task, (out, buffers) in enumerate(model.with_buffers(model.params, model.buffers, one) for one in x):
        assert torch.allclose(y[task], out, atol=1e-14)
        assert all(torch.allclose(after[name][task], moved, atol=1e-14) for name, moved in buffers.items())


@pytest.mark.parametrize("randomness", ["different", "same"])
@pytest.mark.parametrize("tasks_at_once", [None, 1])
def test_dropout_in_a_stacked_problem_is_replayed(randomness, tasks_at_once):
    model = mo.functional(nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 1)).double())
    loss = mo.vmapped(
        lambda w, lam, x: lam * model(w, x).pow(2).mean(), tasks_at_once=tasks_at_once, randomness=randomness
    )
    xs = [torch.randn(2, 5, 4, dtype=F64) for _ in range(T)]
    step = mo.inner_step(loss, mo.optim.SGD(lr=0.1))
    assert agrees(
        step, lambda w, lam, _: tree.norm(w), mo.replicated(model.params, 2), torch.tensor(0.7, dtype=F64), xs
    )


def test_dropout_in_a_stacked_problem_must_say_how_it_is_random():
    loss = mo.vmapped(lambda w, lam, x: lam * F.dropout(w * x).sum(), randomness="error")
    step = mo.inner_step(loss, mo.optim.SGD(lr=0.1))
    with pytest.raises(RuntimeError, match="randomness"):
        mo.hypergradient(
            step,
            loss,
            mo.Stacked(torch.ones(2, 3)),
            torch.tensor(1.0),
            [torch.ones(2, 3)],
            torch.ones(2, 3),
            estimator=mo.RMD(),
        )


# -- checkpoints and compiled functions inside a loss ------------------------------------------------
MODES = [mo.inner.ReverseOverReverse(), mo.inner.ForwardOverReverse()]


class Checkpointing(nn.Module):
    """Recomputes its inside in the backward pass, when a stateless call has long taken the parameters out again."""

    def __init__(self, inside):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.5))
        self.head = nn.Linear(6, 6)
        self.inside = inside

    def forward(self, x):
        return self.head(checkpoint(self.body, x, use_reentrant=False) if self.inside else self.body(x))


@pytest.mark.parametrize("weights", ["body.*", "head.*"])
@pytest.mark.parametrize("trajectory", [mo.trajectory.Full(), mo.trajectory.Graphs()], ids=repr)
def test_torch_checkpoint_inside_a_module_is_exact(weights, trajectory):
    """Silently wrong in peers: all shapes are equal here, so torch itself would not notice."""
    found = []
    for inside in (True, False):
        torch.manual_seed(0)
        model = mo.functional(Checkpointing(inside=inside).double())
        w0, lam = mo.partition(model.params, [weights])
        step = mo.inner_step(
            lambda w, lam, x, model=model: model(mo.merge(w, lam), x).pow(2).mean(), mo.optim.SGD(lr=0.1)
        )
        xs = [torch.randn(5, 6, dtype=F64) for _ in range(T)]
        found.append(mo.hypergradient(step, step.inner_loss, w0, lam, xs, xs[0], estimator=mo.RMD(trajectory)).total)
    assert tree.norm(tree.sub(*found)) < 1e-12 * tree.norm(found[1])


@pytest.mark.parametrize("mode", MODES, ids=lambda m: type(m).__name__)
def test_torch_checkpoint_around_a_call_is_exact(mode):
    model = mo.functional(Checkpointing(inside=False).double())
    w0, lam = mo.partition(model.params, ["head.*"])

    def loss(w, lam, x):
        return checkpoint(model, mo.merge(w, lam), x, use_reentrant=False).pow(2).mean()

    step = mo.inner_step(loss, mo.optim.SGD(lr=0.1), adjoint=mode)
    assert agrees(step, lambda w, lam, _: tree.norm(w), w0, lam, [torch.randn(5, 6, dtype=F64) for _ in range(T)])


def test_reentrant_checkpoint_is_refused_by_torch():
    step, outer, w0, lam, xs = scalar_problem(lambda w, x: checkpoint(lambda w: (x @ w).tanh(), w, use_reentrant=True))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        mo.hypergradient(step, outer, w0, lam, xs, None, estimator=mo.RMD())


@pytest.mark.parametrize("mode", MODES, ids=lambda m: type(m).__name__)
@pytest.mark.filterwarnings("ignore:forward over reverse is impossible")
def test_a_compiled_callee_is_refused_where_it_would_be_differentiated_twice(mode):
    compiled = torch.compile(lambda w, x: (x @ w).tanh(), backend="aot_eager")
    step, outer, w0, lam, xs = scalar_problem(compiled)
    step = mo.inner_step(step.inner_loss, step.optimizer, adjoint=mode)
    with pytest.raises(RuntimeError, match=r"torch\.compile.*give the loss what it was made from"):
        mo.hypergradient(step, outer, w0, lam, xs, None, estimator=mo.RMD())


@pytest.mark.parametrize("mode", MODES, ids=lambda m: type(m).__name__)
@pytest.mark.filterwarnings("ignore:forward over reverse is impossible")
def test_a_compiled_callee_of_lam_alone_is_right(mode):
    """Differentiated once: works, and mixed mode must not drop its tangent."""
    compiled = torch.compile(lambda lam, x: (x @ lam).tanh(), backend="aot_eager")
    w0 = torch.randn(3, 2, dtype=F64)
    lam = torch.randn(4, 3, dtype=F64)
    step = mo.inner_step(lambda w, lam, x: (compiled(lam, x) @ w).pow(3).mean(), mo.optim.SGD(lr=0.1), adjoint=mode)
    plain = mo.inner_step(lambda w, lam, x: ((x @ lam).tanh() @ w).pow(3).mean(), mo.optim.SGD(lr=0.1))
    xs = [torch.randn(5, 4, dtype=F64) for _ in range(T)]
    got, expected = (
        mo.hypergradient(s, lambda w, lam, _: w.pow(2).sum(), w0, lam, xs, None, estimator=mo.RMD()).total
        for s in (step, plain)
    )
    assert torch.allclose(got, expected, rtol=1e-10, atol=1e-12) and got.abs().max() > 1e-6


# -- the run -----------------------------------------------------------------------------------------
def test_the_inner_gradient_is_taken_with_respect_to_the_weights_alone(monkeypatch):
    """Where λ sits in the same module, differentiating with respect to it as well at every step costs O(T²) in peers."""
    model = mo.functional(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double())
    w0, lam = mo.partition(model.params, ["2.*"])
    step = mo.inner_step(lambda w, lam, x: model(mo.merge(w, lam), x).pow(2).mean(), mo.optim.SGD(lr=0.1))
    asked = []
    for where, name in ((torch.autograd, "grad"), (_engine, "products")):
        real = getattr(where, name)

        def noted(outputs, inputs, *args, real=real, **kwargs):
            asked.append(len(inputs))
            return real(outputs, inputs, *args, **kwargs)

        monkeypatch.setattr(where, name, noted)
    xs = [torch.randn(5, 4, dtype=F64) for _ in range(T)]
    mo.hypergradient(step, step.inner_loss, w0, lam, xs, xs[0], estimator=mo.RMD())
    assert (
        asked == [2] * T + [4] + [2, 4] * T
    )  # T gradients; the outer loss's; in the sweep a gradient and a contraction each


def test_another_number_of_threads_is_named_as_a_cause():
    """Sums are split among threads, so their number is part of Φ; here it changes between run and sweep."""
    threads = iter([1] * T + [2] * 10)
    step = mo.inner_step(lambda w, lam, x: ((w - lam) ** 2).sum() * (1 + 1e-10 * next(threads)), mo.optim.SGD(lr=0.1))
    args = (step, lambda w, lam, x: w.sum(), torch.rand(2, dtype=F64), torch.ones(2, dtype=F64), [None] * T, None)
    with pytest.raises(RuntimeError, match=r"step 3: run again .* another number of threads"):
        mo.hypergradient(*args, estimator=mo.RMD(mo.trajectory.Checked(mo.trajectory.Full())))
    assert "threads" in mo.replay.__doc__


def test_no_grad_changes_nothing():
    step, outer, w0, lam, xs = scalar_problem(lambda w, x: (x @ w).tanh())
    expected = mo.hypergradient(step, outer, w0, lam, xs, None, estimator=mo.RMD())
    with torch.no_grad():
        got = mo.hypergradient(step, outer, w0, lam, xs, None, estimator=mo.RMD())
    assert torch.equal(got.total, expected.total) and torch.equal(got.initial, expected.initial)


def test_autocast_keeps_no_casts():
    """Its cache holds the cast of every autograd leaf until the context ends; a run has new leaves at every step."""
    model = mo.functional(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)))
    dtypes = []
    w0, lam = mo.partition(model.params, ["2.*"])

    def loss(w, lam, x):
        out = model(mo.merge(w, lam), x)
        dtypes.append(out.dtype)
        return out.float().pow(2).mean()

    step = mo.inner_step(loss, mo.optim.SGD(lr=0.1))
    x = torch.randn(5, 4)
    exact = mo.hypergradient(step, loss, w0, lam, [x] * T, x, estimator=mo.RMD()).total
    dtypes.clear()
    cleared = []
    real = torch.clear_autocast_cache
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype=torch.bfloat16):
        patch.setattr(torch, "clear_autocast_cache", lambda: (cleared.append(1), real())[1])
        rough = mo.hypergradient(step, loss, w0, lam, [x] * T, x, estimator=mo.RMD()).total
        assert set(dtypes) == {torch.bfloat16} and len(cleared) == len(dtypes) == 2 * T + 1
    assert float(tree.norm(tree.sub(rough, exact)) / tree.norm(exact)) < 0.1


def test_frozen_parameters_in_unroll():
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    net[0].requires_grad_(False)
    model = mo.functional(net, trainable="*")
    lam = {name: p for name, p in net.named_parameters() if not name.startswith("4.")}
    w0 = {name: p.detach() for name, p in net[4].named_parameters(prefix="4")}
    step = mo.inner_step(lambda w, lam, x: model(mo.merge(w, lam), x).pow(2).mean(), mo.optim.SGD(lr=0.1))
    xs = [torch.randn(5, 4, dtype=F64) for _ in range(T)]
    state = mo.unroll(step, w0, lam, xs)
    tree.norm(state.w).backward()
    expected = mo.hypergradient(
        step, lambda w, lam, _: tree.norm(w), w0, tree.detach(lam), xs, None, estimator=mo.RMD()
    ).total
    assert net[0].weight.grad is None and net[4].weight.grad is None
    assert (
        torch.allclose(net[2].weight.grad, expected["2.weight"], rtol=1e-12) and net[2].weight.grad.abs().max() > 1e-8
    )


@pytest.mark.parametrize("needs_grad", [True, False], ids=["inputs require grad", "they do not"])
@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_reentrant_checkpointing_is_refused_by_name(needs_grad):
    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.body = nn.Linear(3, 3)
            self.head = nn.Linear(3, 1)

        def forward(self, x):
            x = self.first(x) if needs_grad else x
            return self.head(checkpoint(self.body, x, use_reentrant=True))

    model = mo.functional(Body().double())
    step = mo.inner_step(lambda w, lam, x: lam * model(w, x).pow(2).mean(), mo.optim.SGD(lr=0.1))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        mo.hypergradient(
            step,
            lambda w, lam, x: model(w, x).sum(),
            model.params,
            torch.ones((), dtype=F64),
            [torch.ones(2, 3, dtype=F64)] * 2,
            torch.ones(2, 3, dtype=F64),
        )
