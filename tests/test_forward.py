"""Forward mode: FMD is autograd through the loop, offline and online, for every step; products are batched, shared and skipped."""

import pytest
import torch
from cases import OPTIMIZERS, OnceDifferentiable, ids
from hypothesis import given
from hypothesis import strategies as st
from problems import close
from torch import nn

import metaopt as mo
from metaopt import tree
from metaopt.estimators.cost import Cost, CountedStep
from metaopt.inner._transposed import columns_per_batch

F64 = torch.float64
T = 4
EXACT = 1e-10


def t64(*values):
    return torch.tensor(values, dtype=F64)


def loss(w, lam, batch):
    x, y = batch
    return (((x @ w["weight"]).tanh() * lam["scale"] + w["bias"][0] - y) ** 2).mean() + lam["decay"] * (
        w["weight"] ** 2
    ).sum()


def outer(w, lam, batch):
    return (w["weight"] ** 3).sum() + (w["bias"].sin() * w["bias"]).sum() + lam["scale"].pow(2).sum()


class Problem:
    """A small tanh layer; λ is a pytree, partly inside the loss, partly (``rate``) for the optimiser alone."""

    def __init__(self, optimizer, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.w0 = {"weight": torch.randn(3, 2, generator=g, dtype=F64), "bias": torch.randn(2, generator=g, dtype=F64)}
        self.lam = {"scale": torch.randn(2, generator=g, dtype=F64), "decay": torch.tensor(0.1, dtype=F64)}
        self.batches = [
            (torch.randn(5, 3, generator=g, dtype=F64), torch.randn(5, 2, generator=g, dtype=F64)) for _ in range(T)
        ]
        self.step = mo.inner_step(loss, optimizer)

    def by(self, estimator):
        return mo.hypergradient(self.step, outer, self.w0, self.lam, self.batches, None, estimator=estimator)

    def by_autograd(self):
        lam = tree.attach(self.lam)
        state = self.step.init(self.w0, self.lam)
        for batch in self.batches:
            state = self.step(state, lam, batch)
        gradients = torch.autograd.grad(outer(state.w, lam, None), tree.leaves(lam), allow_unused=True)
        return tree.filled(tree.unflatten(gradients, tree.flatten(lam)[1]), self.lam)


def scheduled(rates=T):
    """Momentum SGD with one learning rate per step, and a learned momentum; the loss does not see them."""
    optimizer = mo.optim.SGD(
        lr=mo.optim.schedules.piecewise(lambda lam: lam["lr"], T), momentum=lambda lam, t: lam["momentum"]
    )
    problem = Problem(optimizer)
    fixed = problem.lam
    problem.step = mo.inner_step(lambda w, lam, batch: loss(w, fixed, batch), optimizer)
    problem.lam = {"lr": torch.linspace(0.1, 0.3, rates, dtype=F64), "momentum": torch.tensor(0.7, dtype=F64)}
    problem.by = lambda estimator: mo.hypergradient(
        problem.step,
        lambda w, lam, b: outer(w, fixed, b),
        problem.w0,
        problem.lam,
        problem.batches,
        None,
        estimator=estimator,
    )
    return problem


# -- exact ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", OPTIMIZERS, ids=ids(OPTIMIZERS))
def test_fmd_is_autograd_through_the_loop_for_every_optimizer(case):
    problem = Problem(case.make())
    hg = problem.by(mo.FMD())
    assert close(hg.total, problem.by_autograd())
    assert close(hg.total, problem.by(mo.RMD()).total)
    assert hg.initial is None


@pytest.mark.parametrize(
    "optimizer",
    [mo.optim.SGD(lr=0.2, momentum=0.9, nesterov=True, weight_decay=0.1), mo.optim.Adam(lr=0.1)],
    ids=["SGD", "Adam"],
)
@given(seed=st.integers(0, 10_000), columns_at_once=st.sampled_from([None, 1, 2, 3]))
def test_chunks_change_nothing(optimizer, seed, columns_at_once):
    problem = Problem(optimizer, seed)
    assert close(problem.by(mo.FMD(columns_at_once)).total, problem.by_autograd())


@pytest.mark.parametrize(
    "make",
    [
        lambda h: mo.optim.SGD(lr=h("lr"), momentum=h("mu"), weight_decay=h("wd")),
        lambda h: mo.optim.AdamW(lr=h("lr"), betas=(h("mu"), 0.99), weight_decay=h("wd"), eps=1e-3),
        lambda h: mo.optim.ClipNorm(mo.optim.SGD(lr=h("lr"), momentum=h("mu")), max_norm=h("wd")),
    ],
    ids=["SGD", "AdamW", "ClipNorm"],
)
def test_hyperparameters_of_the_optimizer_alone(make):
    problem = Problem(make(lambda name: lambda lam, t: lam[name]))
    problem.lam |= {
        "lr": torch.tensor(0.1, dtype=F64),
        "mu": torch.tensor(0.6, dtype=F64),
        "wd": torch.tensor(0.2, dtype=F64),
    }
    expected = problem.by_autograd()
    assert close(problem.by(mo.FMD()).total, expected)
    assert all(bool(leaf.abs().max() > 1e-6) for leaf in tree.leaves(expected))


def test_element_wise_rates_and_a_shape_of_lam_with_several_axes():
    problem = Problem(mo.optim.SGD(lr=lambda lam, t: {"weight": lam["rates"].exp(), "bias": 0.1}, momentum=0.5))
    problem.lam["rates"] = torch.randn(3, 2, generator=torch.Generator().manual_seed(1), dtype=F64) - 2
    hg = problem.by(mo.FMD())
    assert hg.total["rates"].shape == (3, 2)
    assert close(hg.total, problem.by_autograd())


def test_weights_without_axes_and_without_entries():
    step = mo.inner_step(
        lambda w, lam, _: 0.5 * (w[0] - lam) ** 2 + 0.0 * w[1].sum(), mo.optim.SGD(lr=0.5, momentum=0.1)
    )
    args = (
        step,
        lambda w, lam, _: w[0],
        [torch.tensor(0.0, dtype=F64), torch.zeros(0, 2, dtype=F64)],
        torch.tensor(1.0, dtype=F64),
        [None] * 3,
        None,
    )
    assert close(mo.hypergradient(*args, estimator=mo.FMD()).total, mo.hypergradient(*args, estimator=mo.RMD()).total)


@pytest.mark.parametrize("stacked", [mo.vmapped, mo.looped], ids=lambda f: f.__name__)
def test_a_stacked_meta_batch_is_the_loop_over_tasks(stacked):
    problems = [Problem(mo.optim.Adam(lr=0.1), seed) for seed in range(3)]
    together = problems[0]
    alone = [
        tree.scale(1.0, mo.hypergradient(p.step, outer, p.w0, together.lam, p.batches, None, estimator=mo.FMD()).total)
        for p in problems
    ]
    step = mo.inner_step(stacked(loss), mo.optim.Adam(lr=0.1))
    w0 = mo.Stacked(tree.stack([p.w0 for p in problems]))
    batches = [tree.stack([p.batches[t] for p in problems]) for t in range(T)]
    outer_loss = stacked(lambda w, lam, batch: outer(w, lam, None))
    hg = mo.hypergradient(step, outer_loss, w0, together.lam, batches, torch.zeros(3), estimator=mo.FMD())
    assert close(hg.total, tree.add(tree.add(alone[0], alone[1]), alone[2]))


def test_online_it_is_the_derivative_along_a_common_shift():
    problem = Problem(mo.optim.SGD(lr=0.1, momentum=0.9))
    seen = []
    reports = mo.online(
        problem.step,
        outer,
        problem.w0,
        problem.lam,
        problem.batches,
        [None] * T,
        estimator=mo.FMD(),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.05),
    )
    lams = [problem.lam]
    for report in reports:
        seen.append(report)
        lams.append(report.lam)
    shift = tree.attach(tree.zeros_like(problem.lam))
    state = problem.step.init(problem.w0, problem.lam)
    for batch, lam, report in zip(problem.batches, lams, seen, strict=False):
        state = problem.step(state, tree.add(lam, shift), batch)
        expected = torch.autograd.grad(
            outer(state.w, tree.add(lam, shift), None), tree.leaves(shift), retain_graph=True
        )
        assert close(tree.leaves(report.hypergradient.total), list(expected))
    assert not close(lams[0], lams[-1], 1e-3)


def test_through_unroll_and_without_a_cotangent_of_the_initial_weights():
    problem = Problem(mo.optim.SGD(lr=0.1))
    lam = tree.attach(problem.lam)
    state = mo.unroll(problem.step, problem.w0, lam, problem.batches, estimator=mo.FMD())
    got = torch.autograd.grad(outer(state.w, lam, None), tree.leaves(lam))
    assert close(list(got), tree.leaves(problem.by_autograd()))
    w0 = tree.attach(problem.w0)
    with pytest.raises(RuntimeError, match="FMD has no cotangent for the initial state"):
        tree.norm(mo.unroll(problem.step, w0, lam, problem.batches, estimator=mo.FMD()).w).backward()


# -- steps of every kind -------------------------------------------------------------------------
def test_a_custom_step():
    def fn(state, lam, batch):
        g = torch.autograd.grad(loss(state.w, lam, batch), tree.leaves(state.w), create_graph=True)
        speed = tree.map(lambda v, x: 0.5 * v + x, state.slots, tree.unflatten(g, tree.flatten(state.w)[1]))
        return mo.InnerState(tree.map(lambda x, v: x - 0.1 * lam["decay"].exp() * v, state.w, speed), speed)

    problem = Problem(mo.optim.SGD(lr=0.1))
    problem.step = mo.custom_step(fn, lambda w, lam: mo.InnerState(w, tree.zeros_like(w)))
    expected = problem.by(mo.RMD())
    for columns_at_once in (None, 1, 2):
        hg = problem.by(mo.FMD(columns_at_once))
        assert close(hg.total, expected.total)
        assert hg.cost == Cost(linearizations=T, tangents=3 * T)


def test_slots_held_constant_are_dropped_from_forward_mode_too():
    problem = Problem(mo.optim.SGD(lr=0.1, momentum=0.9))
    exact = problem.by(mo.FMD()).total
    problem.step = mo.inner.ConstantSlots(problem.step)
    assert close(problem.by(mo.FMD()).total, problem.by(mo.RMD()).total)
    assert not close(problem.by(mo.FMD()).total, exact, 1e-3)


@pytest.mark.parametrize("columns_at_once", [None, 1])
def test_an_update_that_is_no_gradient(columns_at_once):
    """Reweighted losses with weights normalised over the batch: the Jacobian of the update is not symmetric."""

    def reweighted_loss(w, lam, batch):
        x, y = batch
        losses = ((x @ w["weight"]).tanh() + w["bias"] - y).pow(2).sum(1)
        return mo.inner.reweighted(losses, lambda v: torch.softmax(lam["scale"].sum() * v, 0)).sum()

    problem = Problem(mo.optim.SGD(lr=0.1, momentum=0.9))
    del problem.lam["decay"]
    problem.step = mo.inner_step(reweighted_loss, mo.optim.SGD(lr=0.1, momentum=0.9))
    assert close(problem.by(mo.FMD(columns_at_once)).total, problem.by(mo.RMD()).total)
    assert problem.by(mo.FMD()).indirect["scale"].abs().min() > 1e-6


def test_random_numbers_are_drawn_once_and_shared_by_all_columns():
    net = mo.functional(torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(3, 2)).double())
    step = mo.inner_step(lambda w, lam, x: (lam * net(w, x).tanh()).pow(2).sum(), mo.optim.SGD(lr=0.1, momentum=0.5))
    lam = torch.ones(2, dtype=F64)
    xs = [torch.randn(5, 3, dtype=F64) for _ in range(3)]
    results = []
    for estimator in (mo.RMD(), mo.FMD()):
        torch.manual_seed(0)
        results.append(
            mo.hypergradient(step, lambda w, lam, _: tree.norm(w), net.params, lam, xs, None, estimator=estimator)
        )
        after = torch.get_rng_state()
        results.append(after)
    assert close(results[0].total, results[2].total)
    assert torch.equal(results[1], results[3])


# -- what is computed, and what is not -----------------------------------------------------------
def test_one_gradient_a_step_and_no_product_before_a_column_moves_the_weights():
    problem = scheduled()
    step = CountedStep(problem.step, Cost())
    estimator = mo.FMD()
    state = problem.step.init(problem.w0, problem.lam)
    carry = estimator.init(step, state, problem.lam)
    products = []
    for batch in problem.batches:
        before = step.cost.tangents
        state, carry = estimator.advance(step, state, problem.lam, batch, carry)
        products.append(step.cost.tangents - before)
    assert products == [
        0,
        1,
        3,
        4,
    ]  # step t: the rates of the steps before it, and the momentum once there is a velocity
    assert step.cost == Cost(linearizations=T, tangents=8, products=1)  # the product: does Φ depend on the momentum?
    assert close(problem.by(mo.FMD()).total, problem.by(mo.RMD()).total)


@pytest.mark.parametrize("columns_at_once", [None, 1])
def test_what_is_differentiable_once_only_is_refused(columns_at_once):
    step = mo.inner_step(lambda w, lam, _: (lam * OnceDifferentiable.apply(w)).sum(), mo.optim.SGD(lr=0.1))
    w = t64(1.0, 2.0, 3.0)
    lam = t64(0.5, -1.0, 2.0)
    with pytest.raises(RuntimeError, match="differentiable once only"):
        mo.hypergradient(step, lambda w, lam, _: w.sum(), w, lam, [None], None, estimator=mo.FMD(columns_at_once))


def test_columns_inside_the_loss_take_one_product_each():
    assert Problem(mo.optim.SGD(lr=0.1)).by(mo.FMD()).cost == Cost(linearizations=T, tangents=3 * T)


def test_the_gradient_with_its_graph_is_taken_once_a_step():
    calls = []

    def counted(w, lam, batch):
        calls.append(1)
        return loss(w, lam, batch)

    problem = Problem(mo.optim.Adam(lr=0.1))
    problem.step = mo.inner_step(counted, mo.optim.Adam(lr=0.1))
    problem.by(mo.FMD())
    assert len(calls) == T


def test_batches_get_smaller_as_the_graph_grows():
    def columns(size):
        w = torch.ones(size, requires_grad=True)
        return columns_per_batch([torch.autograd.grad((w.sin() * w).sum(), w, create_graph=True)[0]])

    assert columns(10) > columns(1000) > 1
    assert columns(1 << 23) == 1


def test_memory_is_that_of_the_columns_whatever_the_horizon():
    problem = Problem(mo.optim.Adam(lr=0.1))
    estimator = mo.FMD()
    state = problem.step.init(problem.w0, problem.lam)
    carry = estimator.init(problem.step, state, problem.lam)
    sizes = []
    for batch in problem.batches:
        state, carry = estimator.advance(problem.step, state, problem.lam, batch, carry)
        sizes.append(sum(leaf.numel() for leaf in tree.floats(carry.Z)))
    assert set(sizes) == {3 * 3 * 8}  # three columns of weights and Adam's two slots


# -- what λ is used for --------------------------------------------------------------------------
def test_a_leaf_that_is_used_but_moves_nothing_is_no_unused_leaf():
    """In the first step the momentum multiplies a zero velocity: its hypergradient is zero, and that is no mistake of the user's."""
    optimizer = mo.optim.SGD(lr=0.1, momentum=lambda lam, t: lam)
    step = mo.inner_step(lambda w, lam, _: (w**2).sum(), optimizer)
    hg = mo.hypergradient(
        step, lambda w, lam, _: w.sum(), t64(1.0), torch.tensor(0.5, dtype=F64), [None], None, estimator=mo.FMD()
    )
    assert hg.total == 0.0


def test_an_unused_leaf_is_named():
    problem = Problem(mo.optim.SGD(lr=0.1))
    problem.lam["idle"] = t64(1.0)
    with pytest.warns(mo.UnusedHyperparameterWarning, match="idle"):
        hg = problem.by(mo.FMD())
    assert close(hg.total["scale"], problem.by_autograd()["scale"])


def test_bad_settings_and_bad_lam_are_named():
    with pytest.raises(ValueError, match="FMD: columns_at_once must be at least 1, got 0"):
        mo.FMD(columns_at_once=0)
    problem = Problem(mo.optim.SGD(lr=0.1))
    problem.lam["decay"] = torch.tensor(1)
    with pytest.raises(ValueError, match=r"decay.*int64.*hyperparameters are floating-point"):
        problem.by(mo.FMD())
    step = mo.inner_step(lambda w, lam, _: lam.detach().sum() * 1.0, mo.optim.SGD(lr=0.1))
    with pytest.raises(ValueError, match=r"inner_loss does not depend|graph was cut"):
        mo.hypergradient(step, lambda w, lam, _: w.sum(), t64(1.0), t64(1.0), [None], None, estimator=mo.FMD())


def test_what_cannot_be_batched_says_how_to_go_on():
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * (1.0 + 0.0 * g.sum().item())

    step = mo.inner_step(lambda w, lam, _: (Opaque.apply(w) ** 3 * lam).sum(), mo.optim.SGD(lr=0.1))
    args = (step, lambda w, lam, _: w.sum(), t64(1.0, 2.0), t64(1.0, 2.0), [None] * 2, None)
    with pytest.raises(RuntimeError, match=r"batched second-order products failed.*columns_at_once=1"):
        mo.hypergradient(*args, estimator=mo.FMD())
    assert close(
        mo.hypergradient(*args, estimator=mo.FMD(columns_at_once=1)).total,
        mo.hypergradient(*args, estimator=mo.RMD()).total,
    )


LAYERS = {
    "GroupNorm, one group, one image": (nn.GroupNorm(1, 16), (1, 16, 4, 4)),
    "GroupNorm, two groups": (nn.GroupNorm(2, 8), (4, 8, 4, 4)),
    "GroupNorm without weights": (nn.GroupNorm(1, 8, affine=False), (8, 8, 4, 4)),
    "GroupNorm, a group per channel": (nn.GroupNorm(8, 8), (3, 8, 2, 5)),
    "InstanceNorm": (nn.InstanceNorm2d(8, affine=True), (3, 8, 4, 4)),
    "LayerNorm": (nn.LayerNorm([8, 4]), (3, 8, 4)),
    "RMSNorm": (nn.RMSNorm(4), (3, 8, 4)),
    "BatchNorm": (nn.BatchNorm2d(8), (3, 8, 4, 4)),
    "LocalResponseNorm": (nn.LocalResponseNorm(3), (3, 8, 4, 4)),
    "Conv2d": (nn.Conv2d(8, 4, 3, padding=1, groups=2), (3, 8, 4, 4)),
    "ConvTranspose2d": (nn.ConvTranspose2d(8, 4, 3, stride=2), (3, 8, 4, 4)),
    "MaxPool2d": (nn.MaxPool2d(2), (3, 8, 4, 4)),
    "AvgPool2d": (nn.AvgPool2d(2), (3, 8, 4, 4)),
    "AdaptiveAvgPool2d": (nn.AdaptiveAvgPool2d(3), (3, 8, 4, 4)),
    "Upsample": (nn.Upsample(scale_factor=2, mode="bilinear"), (3, 8, 4, 4)),
    "PixelShuffle": (nn.PixelShuffle(2), (3, 8, 4, 4)),
    "GLU": (nn.GLU(1), (3, 8, 4)),
    "Softmax": (nn.Softmax(1), (3, 8, 4)),
    "PReLU": (nn.PReLU(), (3, 8, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_batched_columns_through_a_layer_are_single_ones(name):
    """Torch has a batching rule for each derivative; that of group norm is wrong for some shapes."""
    layer, shape = LAYERS[name]
    torch.manual_seed(0)
    mixing = torch.randn(shape[1], shape[1], dtype=F64)
    model = mo.functional(nn.Sequential(nn.Conv1d(shape[1], shape[1], 1), nn.Unflatten(2, shape[2:]), layer).double())
    x = torch.einsum("ij,njk->nik", mixing, torch.randn(shape, dtype=F64).flatten(2))

    def inner(w, lam, batch):
        return (model(w, batch * lam["gain"] + batch**2).tanh() ** 2).mean() + lam["l2"] * sum(
            p.pow(2).sum() for p in w.values()
        )

    lam = {"gain": torch.tensor(0.7, dtype=F64), "l2": torch.tensor(0.01, dtype=F64)}
    step = mo.inner_step(inner, mo.optim.SGD(lr=0.1))
    args = (step, lambda w, lam, batch: model(w, batch).sin().mean(), model.params, lam, [x] * 3, x)
    expected = mo.hypergradient(*args, estimator=mo.RMD()).total
    for estimator in (mo.FMD(), mo.FMD(columns_at_once=1)):
        assert close(mo.hypergradient(*args, estimator=estimator).total, expected)
    assert min(abs(x) for x in tree.leaves(expected)) > 1e-6
