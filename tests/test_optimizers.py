"""Inner optimisers: torch's numbers, and derivatives in everything."""

import functools

import pytest
import torch
from cases import OPTIMIZERS, ids
from hypothesis import given
from hypothesis import strategies as st
from problems import noise_like

import metaopt as mo
from metaopt import tree
from metaopt.inner import InnerState
from metaopt.inner._update import pull_back
from metaopt.optim import schedules

F64 = torch.float64
each_optimizer = pytest.mark.parametrize("case", OPTIMIZERS, ids=ids(OPTIMIZERS))
with_torch = [case for case in OPTIMIZERS if case.torch is not None]


@pytest.fixture(autouse=True)
def _double():
    """torch keeps some slots as numbers of the default dtype."""
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


def matrices(case):
    """Weights that this optimiser takes: Muon wants matrices only."""
    return (
        {"a": torch.randn(3, 2), "b": torch.randn(2, 4)}
        if case.name == "Muon"
        else {"a": torch.randn(3, 2), "b": torch.randn(4)}
    )


def loss(w, lam, batch):
    return sum(((w[k] * lam["scale"] - batch[k]).tanh() ** 2 + 0.1 * (w[k] - 1) ** 2).sum() for k in w)


def problem(case, T=4, seed=0):
    torch.manual_seed(seed)
    w0 = matrices(case)
    return w0, {"scale": torch.tensor(0.7)}, [noise_like(w0) for _ in range(T)]


def outer(w, lam, batch):
    return sum((x**3).sum() + x.sum() for x in w.values())


# -- values --------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", with_torch, ids=ids(with_torch))
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_torch_over_50_steps(case, seed):
    torch.manual_seed(seed)
    w = {"a": torch.randn(3, 2), "b": torch.randn(4)}
    params = [x.clone().requires_grad_() for x in w.values()]
    theirs = case.torch(params)
    ours = case.make()
    slots = ours.init(w)
    for t in range(1, 51):
        g = {k: torch.randn_like(x) * (0.0 if t == 7 else 1.0) for k, x in w.items()}
        w, slots = ours.update(g, w, slots, None, t)
        for p, x in zip(params, g.values(), strict=True):
            p.grad = x.clone()
        theirs.step()
        for p, x in zip(params, w.values(), strict=True):
            assert torch.allclose(p, x, rtol=1e-12, atol=1e-12), t


@pytest.mark.parametrize(
    "options", [{}, {"nesterov": False, "adjust_lr_fn": "match_rms_adamw"}], ids=["default", "match rms"]
)
def test_muon_equals_torch(options):
    w = torch.randn(5, 3)
    parameter = w.clone().requires_grad_()
    theirs = torch.optim.Muon([parameter], lr=0.05, **options)
    ours = mo.optim.Muon(lr=0.05, **options)
    slots = ours.init(w)
    for t in range(1, 21):
        g = torch.randn(5, 3)
        w, slots = ours.update(g, w, slots, None, t)
        parameter.grad = g.clone()
        theirs.step()
    # the iteration runs in bfloat16 (8 bits) in both; x / ‖x‖ may round differently in the last of
    # them
    assert torch.allclose(parameter, w, atol=2e-3)


def test_lion_by_hand():
    w = torch.ones(3)
    m = torch.zeros(3)
    slots = None
    ours = mo.optim.Lion(lr=0.1, weight_decay=0.5)
    slots = ours.init(w)
    for t in range(1, 6):
        g = torch.randn(3)
        expected = w * (1 - 0.1 * 0.5) - 0.1 * (0.9 * m + 0.1 * g).sign()
        m = 0.99 * m + 0.01 * g
        w, slots = ours.update(g, w, slots, None, t)
        assert torch.allclose(w, expected, atol=1e-14)


def test_clipping_equals_torchs():
    g = {"a": torch.randn(3), "b": 5 * torch.randn(2)}
    params = [torch.zeros_like(x) for x in g.values()]
    for make, clip in [
        (lambda o: mo.optim.ClipNorm(o, max_norm=0.7), lambda p: torch.nn.utils.clip_grad_norm_(p, 0.7)),
        (lambda o: mo.optim.ClipValue(o, limit=0.3), lambda p: torch.nn.utils.clip_grad_value_(p, 0.3)),
    ]:
        for p, x in zip(params, g.values(), strict=True):
            p.grad = x.clone()
        clip(params)
        ours = make(mo.optim.SGD(lr=1.0))
        w, _ = ours.update(g, tree.zeros_like(g), ours.init(g), None, 1)
        for p, x in zip(params, w.values(), strict=True):
            assert torch.allclose(-p.grad, x, atol=1e-12)


def test_accumulation_is_one_step_on_the_mean():
    w = torch.randn(4)
    gs = torch.randn(6, 4)
    accumulated = mo.optim.Accumulate(mo.optim.Adam(lr=0.1), every=3)
    plain = mo.optim.Adam(lr=0.1)
    a = w
    slots = accumulated.init(w)
    for t, g in enumerate(gs, start=1):
        a, slots = accumulated.update(g, a, slots, None, t)
    b = w
    slots = plain.init(w)
    for t, g in enumerate(gs.view(2, 3, 4).mean(1), start=1):
        b, slots = plain.update(g, b, slots, None, t)
    assert torch.allclose(a, b, atol=1e-14)


def test_ema_averages_beside_the_run():
    averaged = mo.optim.EMA(mo.optim.SGD(lr=0.1), decay=0.8)
    plain = mo.optim.SGD(lr=0.1)
    w = a = torch.randn(3)
    b = w
    slots = averaged.init(w)
    for t in range(1, 5):
        g = torch.randn(3)
        a, _ = plain.update(g, a, {}, None, t)
        w, slots = averaged.update(g, w, slots, None, t)
        b = 0.8 * b + 0.2 * a
    assert torch.equal(w, a)
    assert torch.allclose(slots["average"], b, atol=1e-14)


def test_the_averages_decay_is_differentiable_through_the_slot():
    w0, lam, batches = problem(OPTIMIZERS[0], T=4)
    step = mo.inner_step(loss, mo.optim.EMA(mo.optim.SGD(lr=0.1), decay=lambda lam, t: lam["x"]))

    def value(x):
        state = step.init(w0, {**lam, "x": x})
        here = {**lam, "x": x}
        for batch in batches:
            state = step(state, here, batch)
        return outer(state.slots["average"], here, None)

    x = torch.tensor(0.7, requires_grad=True)
    by_loop = torch.autograd.grad(value(x), x)[0]
    difference = (value(torch.tensor(0.7 + 1e-6)) - value(torch.tensor(0.7 - 1e-6))) / 2e-6
    state = step.init(w0, {**lam, "x": torch.tensor(0.7)})
    here = {**lam, "x": torch.tensor(0.7)}
    states = []
    for batch in batches:
        states.append(state)
        state = step(state, here, batch)
    average = tree.attach(state.slots["average"])
    bar = tree.zeros_like(state)
    bar.slots["average"].update(
        zip(average, torch.autograd.grad(outer(average, here, None), list(average.values())), strict=True)
    )
    by_sweep = 0.0
    for before, batch in zip(reversed(states), reversed(batches), strict=True):
        bar, lam_bar = step.vjp(before, here, batch, bar)
        by_sweep = by_sweep + lam_bar["x"]
    assert float(by_loop) == pytest.approx(float(difference), rel=1e-6)
    assert float(by_sweep) == pytest.approx(float(by_loop), rel=1e-10)
    assert abs(float(by_loop)) > 1e-3


def test_groups_give_each_weight_its_optimiser():
    w = {"body": {"weight": torch.randn(2, 2)}, "head": torch.randn(3)}
    g = {"body": {"weight": torch.randn(2, 2)}, "head": torch.randn(3)}
    ours = mo.optim.Groups([(["head"], mo.optim.SGD(lr=0.5)), (["body.*"], mo.optim.Frozen())])
    moved, _ = ours.update(g, w, ours.init(w), None, 1)
    assert torch.equal(moved["body"]["weight"], w["body"]["weight"])
    assert torch.allclose(moved["head"], w["head"] - 0.5 * g["head"])
    with pytest.raises(ValueError, match=r"'head' is in no group"):
        mo.optim.Groups([(["body.*"], mo.optim.Frozen())]).init(w)
    with pytest.raises(ValueError, match=r"group \['tail'\] has no weight"):
        mo.optim.Groups([(["tail"], mo.optim.Frozen()), (["*"], mo.optim.Frozen())]).init(w)


@pytest.mark.parametrize(
    "wrapped",
    [
        mo.optim.ClipNorm(mo.optim.SGD(lr=0.1), max_norm=0.3),
        mo.optim.Adafactor(lr=0.1),
        mo.optim.Muon(lr=0.1, dtype=None),
    ],
    ids=lambda o: type(o).__name__,
)
def test_whole_tensor_optimisers_are_mapped_over_tasks(wrapped):
    tasks = torch.randn(3, 4, 2)
    per_task = mo.optim.PerTask(wrapped)
    w = tasks
    slots = per_task.init(tasks)
    alone = [(task, wrapped.init(task)) for task in tasks]
    for t in range(1, 4):
        g = torch.randn(3, 4, 2)
        w, slots = per_task.update(g, w, slots, None, t)
        alone = [wrapped.update(g[i], x, s, None, t) for i, (x, s) in enumerate(alone)]
    assert torch.allclose(w, torch.stack([x for x, _ in alone]), atol=1e-12)
    assert not wrapped.elementwise


@pytest.mark.parametrize(
    "case", [c for c in OPTIMIZERS if c.make().elementwise and c.name not in ("Groups", "Frozen")], ids=lambda c: c.name
)
def test_elementwise_optimisers_need_no_mapping(case):
    w = torch.randn(3, 4)
    ours = case.make()
    together = w
    slots = ours.init(w)
    alone = [(x, ours.init(x)) for x in w]
    for t in range(1, 4):
        g = torch.randn(3, 4)
        together, slots = ours.update(g, together, slots, None, t)
        alone = [ours.update(g[i], x, s, None, t) for i, (x, s) in enumerate(alone)]
    assert torch.allclose(together, torch.stack([x for x, _ in alone]), atol=1e-14)


# -- derivatives ---------------------------------------------------------------------------------
@each_optimizer
def test_rmd_is_autograd_through_the_loop(case):
    w0, lam, batches = problem(case)
    step = mo.inner_step(loss, case.make())
    hg = mo.hypergradient(step, outer, w0, lam, batches, None, estimator=mo.RMD())
    leaf = {"scale": lam["scale"].clone().requires_grad_()}
    w = tree.attach(w0)
    state = InnerState(w, step.optimizer.init(w))
    for batch in batches:
        state = step(state, leaf, batch)
    by_loop = torch.autograd.grad(outer(state.w, leaf, None), [leaf["scale"], *w.values()], allow_unused=True)
    expected = [
        torch.zeros_like(x) if g is None else g for g, x in zip(by_loop, [lam["scale"], *w0.values()], strict=True)
    ]
    assert torch.allclose(hg.total["scale"], expected[0], rtol=1e-10, atol=1e-12)
    for mine, theirs in zip(hg.initial.values(), expected[1:], strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-12)


@each_optimizer
@given(seed=st.integers(0, 1000))
def test_pullback_and_tangent_are_transposes(case, seed):
    w0, lam, batches = problem(case, seed=seed)
    step = mo.inner_step(loss, case.make())
    state = step.init(w0, lam)
    for batch in batches[:2]:
        state = step(state, lam, batch)
    dot = InnerState(noise_like(state.w), noise_like(state.slots), state.t)
    bar = InnerState(noise_like(state.w), noise_like(state.slots), state.t)
    lam_dot = noise_like(lam)
    forward = step.jvp(state, lam, batches[2], dot, lam_dot)
    state_bar, lam_bar = step.vjp(state, lam, batches[2], bar)
    left = tree.dot((forward.w, forward.slots), (bar.w, bar.slots))
    right = tree.dot((dot.w, dot.slots), (state_bar.w, state_bar.slots)) + tree.dot(lam_dot, tree.filled(lam_bar, lam))
    assert float(left) == pytest.approx(float(right), rel=1e-8, abs=1e-10)


@pytest.mark.parametrize(
    "case",
    [c for c in OPTIMIZERS if type(c.make()).transpose_leaf is not mo.optim.Optimizer.transpose_leaf],
    ids=lambda c: c.name,
)
@pytest.mark.parametrize("with_slots", [True, False])
@pytest.mark.parametrize("t", [0, 3])
def test_the_transpose_shortcut_is_what_autograd_gives(case, with_slots, t):
    ours = case.make()
    w = {"a": torch.randn(3), "b": torch.randn(2, 2)}
    g = {"a": torch.randn(3), "b": torch.randn(2, 2)}
    state = InnerState(w, noise_like(ours.init(w)), t)
    bar = InnerState(noise_like(w), noise_like(state.slots) if with_slots else None)
    g_ = tree.attach(g)
    state_ = tree.attach(state)
    new_w, new_slots = ours.update(g_, state_.w, state_.slots, None, t + 1)
    outputs = tree.leaves(new_w)
    seeds = tree.leaves(bar.w)
    if with_slots:
        outputs = outputs + tree.floats(new_slots)
        seeds = seeds + tree.floats(bar.slots)
    expected = torch.autograd.grad(outputs, tree.leaves(g_) + tree.floats(state_), seeds)
    u, w_bar, slots_bar, _ = pull_back(ours, g, state, None, bar, "state")
    for mine, theirs in zip(tree.floats((u, w_bar, slots_bar)), expected, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-14, atol=1e-14)


def settings():
    """Every hyperparameter of every optimiser, as ``(name, optimiser of x, x0)``: the optimiser with that one set to x."""
    matrix = functools.partial(mo.optim.Muon, dtype=None)
    table = [
        (mo.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1}, {}),
        (mo.optim.Adam, {"lr": 0.05, "eps": 1e-2, "weight_decay": 0.1}, {}),
        (mo.optim.AdamW, {"lr": 0.05, "eps": 1e-2, "weight_decay": 0.1}, {}),
        (mo.optim.NAdam, {"lr": 0.05, "eps": 1e-2, "weight_decay": 0.1, "momentum_decay": 0.1}, {}),
        (mo.optim.RAdam, {"lr": 0.05, "eps": 1e-2, "weight_decay": 0.1}, {"betas": (0.9, 0.9)}),
        (mo.optim.Adamax, {"lr": 0.05, "eps": 1e-2, "weight_decay": 0.1}, {}),
        (
            mo.optim.RMSprop,
            {"lr": 0.05, "alpha": 0.9, "eps": 1e-2, "weight_decay": 0.1, "momentum": 0.5},
            {"centered": True},
        ),
        (mo.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "eps": 1e-2}, {}),
        (mo.optim.Adadelta, {"lr": 1.0, "rho": 0.9, "eps": 1e-2, "weight_decay": 0.1}, {}),
        (mo.optim.ASGD, {"lr": 0.1, "lambd": 0.1, "alpha": 0.75, "weight_decay": 0.1}, {}),
        (mo.optim.Rprop, {"lr": 0.05}, {}),
        (mo.optim.Lion, {"lr": 0.05, "weight_decay": 0.1}, {}),
        (mo.optim.Adafactor, {"lr": 0.05, "beta2_decay": -0.8, "d": 0.5, "weight_decay": 0.1}, {}),
        (matrix, {"lr": 0.05, "weight_decay": 0.1, "momentum": 0.9}, {}),
    ]
    for make, values, options in table:
        label = "Muon" if make is matrix else make.__name__
        for name, x0 in values.items():
            rest = {**options, **{k: v for k, v in values.items() if k != name}}
            yield pytest.param(
                lambda h, make=make, name=name, rest=rest: make(**{name: h}, **rest), x0, label, id=f"{label}.{name}"
            )
    for cls in (mo.optim.Adam, mo.optim.NAdam, mo.optim.RAdam, mo.optim.Adamax):
        for i, x0 in enumerate((0.8, 0.9)):
            yield pytest.param(
                lambda h, cls=cls, i=i: cls(lr=0.05, eps=1e-2, betas=(h, 0.9) if i == 0 else (0.8, h)),
                x0,
                cls.__name__,
                id=f"{cls.__name__}.beta{i + 1}",
            )
    yield pytest.param(lambda h: mo.optim.Rprop(lr=0.05, etas=(h, 1.2)), 0.5, "Rprop", id="Rprop.eta-")
    yield pytest.param(lambda h: mo.optim.Rprop(lr=0.05, etas=(0.5, h)), 1.2, "Rprop", id="Rprop.eta+")
    yield pytest.param(lambda h: mo.optim.Rprop(lr=0.05, step_sizes=(1e-6, h)), 0.055, "Rprop", id="Rprop.largest")
    yield pytest.param(lambda h: mo.optim.Rprop(lr=0.05, step_sizes=(h, 50.0)), 0.045, "Rprop", id="Rprop.smallest")
    yield pytest.param(lambda h: mo.optim.Adafactor(lr=0.05, eps=(None, h)), 3.0, "Adafactor", id="Adafactor.eps2")
    yield pytest.param(lambda h: mo.optim.Adafactor(lr=0.05, eps=(h, 1e-3)), 0.5, "Adafactor", id="Adafactor.eps1")
    yield pytest.param(
        lambda h: mo.optim.ClipNorm(mo.optim.SGD(lr=0.1), max_norm=h), 0.5, "ClipNorm", id="ClipNorm.max_norm"
    )
    yield pytest.param(
        lambda h: mo.optim.ClipValue(mo.optim.SGD(lr=0.1), limit=h), 0.3, "ClipValue", id="ClipValue.limit"
    )


@pytest.mark.parametrize(("make", "x0", "name"), list(settings()))
def test_every_hyperparameter_is_differentiable(make, x0, name):
    """RMD = tangents rolled forward = central difference."""
    case = next(case for case in OPTIMIZERS if case.name.startswith(name))
    w0, lam, batches = problem(case, T=8 if name == "RAdam" else 5)  # RAdam is adaptive from step 6 on
    lam = {**lam, "x": torch.tensor(float(x0))}
    step = mo.inner_step(loss, make(lambda lam, t: lam["x"]))
    exact = mo.hypergradient(step, outer, w0, lam, batches, None, estimator=mo.RMD()).total["x"]

    state = step.init(w0, lam)
    dot = InnerState(tree.zeros_like(state.w), tree.zeros_like(state.slots), 0)
    for batch in batches:
        dot = step.jvp(state, lam, batch, dot, {"scale": torch.zeros(()), "x": torch.ones(())})
        state = step(state, lam, batch)
    alpha = torch.autograd.grad(outer(w := tree.attach(state.w), lam, None), list(w.values()))
    forward = sum((a * d).sum() for a, d in zip(alpha, dot.w.values(), strict=True))
    assert float(exact) == pytest.approx(float(forward), rel=1e-9)

    def value(x):
        s = step.init(w0, lam)
        here = {**lam, "x": torch.tensor(x)}
        for batch in batches:
            s = step(s, here, batch)
        return float(outer(s.w, here, None))

    h = 1e-6 * max(1.0, abs(x0))
    assert float(exact) == pytest.approx((value(x0 + h) - value(x0 - h)) / (2 * h), rel=2e-5, abs=1e-7)
    assert abs(float(exact)) > 1e-8  # not a zero that two methods agree on


@pytest.mark.parametrize(
    "make",
    [
        mo.optim.Adam,
        mo.optim.AdamW,
        mo.optim.Adagrad,
        mo.optim.RMSprop,
        functools.partial(mo.optim.RMSprop, centered=True),
        mo.optim.Adadelta,
        mo.optim.NAdam,
        mo.optim.RAdam,
        mo.optim.Adafactor,
        mo.optim.Adamax,
    ],
)
def test_derivatives_are_finite_where_gradient_and_second_moment_are_zero(make):
    step = mo.inner_step(lambda w, lam, b: lam * (w**2).sum() * 0.5, make())
    w0 = torch.tensor([0.0, 1.0])
    lam = torch.tensor(1.0)
    hg = mo.hypergradient(step, lambda w, lam, b: w.sum(), w0, lam, [None] * 3, None, estimator=mo.RMD())
    assert torch.isfinite(hg.total)
    assert torch.isfinite(hg.initial).all()


def test_adam_at_zero_has_the_slope_of_its_formula():
    """At g = 0, v = 0 one step is w - η g / (|g| + ε): slope -η/ε in g."""
    optimizer = mo.optim.Adam(lr=0.1, eps=1e-3)
    g = torch.zeros(1, requires_grad=True)
    w, _ = optimizer.update(g, torch.zeros(1), optimizer.init(torch.zeros(1)), None, 1)
    assert torch.autograd.grad(w.sum(), g)[0].item() == pytest.approx(-0.1 / 1e-3)


@pytest.mark.parametrize("make", [mo.optim.Rprop, mo.optim.Lion])
def test_sign_methods_have_the_derivative_of_what_they_are(make):
    """The sign is constant almost everywhere: the loss's hyperparameters have no response, and differences agree."""
    step = mo.inner_step(loss, make(lr=0.05))
    w0 = {"a": torch.randn(3)}
    lam = {"scale": torch.tensor(0.7)}
    batches = [{"a": torch.randn(3)} for _ in range(3)]
    assert (
        mo.hypergradient(step, lambda w, lam, b: w["a"].sum(), w0, lam, batches, None, estimator=mo.RMD())
        .total["scale"]
        .item()
        == 0.0
    )


# -- learned rates, schedules, transforms --------------------------------------------------------
def test_joint_rate_momentum_decay_and_schedule_against_the_linear_recursion():
    """Quadratic loss: w and v follow a linear recursion that autograd can differentiate without any of our code."""
    T = 5
    h = torch.tensor([0.5, 2.0])
    w0 = torch.tensor([1.0, -2.0])
    lam = {"lr": torch.linspace(0.05, 0.2, T), "mu": torch.tensor(0.6), "wd": torch.tensor(0.1)}
    sgd = mo.optim.SGD(
        lr=lambda lam, t: lam["lr"][t - 1], momentum=lambda lam, t: lam["mu"], weight_decay=lambda lam, t: lam["wd"]
    )
    step = mo.inner_step(lambda w, lam, b: 0.5 * (h * w**2).sum(), sgd)
    hg = mo.hypergradient(step, lambda w, lam, b: (w**2).sum(), w0, lam, [None] * T, None, estimator=mo.RMD())
    leaf = tree.attach(lam)
    w = w0
    v = torch.zeros(2)
    for t in range(T):
        v = leaf["mu"] * v + (h + leaf["wd"]) * w
        w = w - leaf["lr"][t] * v
    expected = torch.autograd.grad((w**2).sum(), list(leaf.values()))
    for mine, theirs in zip(hg.total.values(), expected, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-12)


def test_element_wise_learning_rates():
    """Meta-SGD: a rate for every weight, as a pytree like w."""
    w0 = {"a": torch.randn(3)}
    lam = {"lr": {"a": torch.rand(3)}}
    step = mo.inner_step(lambda w, lam, b: 0.5 * (w["a"] ** 2).sum(), mo.optim.SGD(lr=lambda lam, t: lam["lr"]))
    hg = mo.hypergradient(step, lambda w, lam, b: w["a"].sum(), w0, lam, [None], None, estimator=mo.RMD())
    assert torch.allclose(hg.total["lr"]["a"], -w0["a"])


def test_schedules():
    at = lambda s: [round(float(s(None, t)), 6) for t in range(1, 5)]  # noqa: E731
    assert at(schedules.constant(0.5)) == [0.5] * 4
    assert at(schedules.step_decay(1.0, every=2)) == [1.0, 1.0, 0.1, 0.1]
    assert at(schedules.cosine(1.0, 4)) == [1.0, 0.853553, 0.5, 0.146447]
    assert at(schedules.warm_up(schedules.constant(1.0), 2)) == [0.5, 1.0, 1.0, 1.0]
    assert at(schedules.piecewise(torch.tensor([1.0, 2.0]), 4)) == [1.0, 1.0, 2.0, 2.0]
    lam = torch.tensor([3.0, 4.0], requires_grad=True)
    assert schedules.piecewise(lambda lam: lam, 4)(lam, 3).grad_fn is not None
    with pytest.raises(ValueError, match="horizon must be at least 1"):
        schedules.cosine(1.0, 0)


def test_meta_curvature_starts_as_the_identity_and_is_learned():
    w0 = {"m": torch.randn(3, 2), "v": torch.randn(4)}
    lam = mo.optim.identity_factors(w0)
    plain = mo.optim.SGD(lr=0.1)
    step = mo.inner_step(
        lambda w, lam, b: sum((x**2).sum() for x in w.values()), mo.optim.meta_curvature(plain, lambda lam: lam)
    )
    state = step(step.init(w0, lam), lam, None)
    assert torch.allclose(state.w["m"], w0["m"] - 0.1 * 2 * w0["m"])
    hg = mo.hypergradient(
        step, lambda w, lam, b: w["m"].sum() + w["v"].sum(), w0, lam, [None], None, estimator=mo.RMD()
    ).total
    g = 2 * w0["m"]
    assert torch.allclose(hg["m"][0], -0.1 * torch.ones(3, 2) @ g.T)  # d/dM_o of -lr (M_o G M_i) summed
    assert torch.allclose(hg["m"][1], -0.1 * g.T @ torch.ones(3, 2))
    assert torch.allclose(hg["v"][0], -0.1 * torch.outer(torch.ones(4), 2 * w0["v"]))


def test_weights_of_several_dtypes():
    w0 = {"half": torch.randn(3, dtype=torch.float32), "double": torch.randn(2)}
    step = mo.inner_step(
        lambda w, lam, b: (w["half"].double() ** 2).sum() * lam + (w["double"] ** 2).sum() * lam, mo.optim.Adam(lr=0.01)
    )
    hg = mo.hypergradient(
        step,
        lambda w, lam, b: w["half"].sum().double() + w["double"].sum(),
        w0,
        torch.tensor(1.0),
        [None] * 2,
        None,
        estimator=mo.RMD(),
    )
    assert hg.state.w["half"].dtype == torch.float32
    assert hg.initial["double"].dtype == torch.float64


# -- torch.optim ---------------------------------------------------------------------------------
CONVERTIBLE = [c for c in with_torch]


@pytest.mark.parametrize("case", CONVERTIBLE, ids=ids(CONVERTIBLE))
@pytest.mark.parametrize("steps", [0, 3])
def test_from_torch_goes_on_where_torch_stands(case, steps):
    module = torch.nn.Linear(3, 2)
    theirs = case.torch(list(module.parameters()))

    def torch_step(g):
        for p, x in zip(module.parameters(), g.values(), strict=True):
            p.grad = x.clone()
        theirs.step()

    def draw():
        return {name: torch.randn_like(p) for name, p in module.named_parameters()}

    for _ in range(steps):
        torch_step(draw())
    ours = mo.interop.from_torch(theirs, module)
    w = mo.functional(module).params
    state = mo.inner_step(lambda w, lam, b: 0.0, ours).init(w, None)
    slots = state.slots
    t = state.t
    for _ in range(5):
        g = draw()
        t = t + 1
        torch_step(g)
        w, slots = ours.update(g, w, slots, None, t)
    for p, x in zip(module.parameters(), w.values(), strict=True):
        assert torch.allclose(p, x, rtol=1e-12, atol=1e-12)


def test_from_torch_takes_groups_over():
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 1))
    theirs = torch.optim.SGD(
        [{"params": [module[1].bias, module[1].weight], "lr": 0.5}, {"params": module[0].parameters()}],
        lr=0.01,
        momentum=0.9,
    )
    for _ in range(2):
        for p in module.parameters():
            p.grad = torch.randn_like(p)
        theirs.step()
    ours = mo.interop.from_torch(theirs, module)
    w = mo.functional(module).params
    g = {name: torch.randn_like(p) for name, p in module.named_parameters()}
    moved, _ = ours.update(g, w, ours.init(w), None, ours.steps_taken + 1)
    for p, x in zip(module.parameters(), g.values(), strict=True):
        p.grad = x
    theirs.step()
    for p, x in zip(module.parameters(), moved.values(), strict=True):
        assert torch.allclose(p, x, atol=1e-14)


def test_from_torch_says_what_it_cannot_do():
    a = torch.nn.Parameter(torch.zeros(1))
    b = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(TypeError, match=r"LBFGS has no differentiable counterpart"):
        mo.interop.from_torch(torch.optim.LBFGS([a]))
    with pytest.raises(ValueError, match="pass the module"):
        mo.interop.from_torch(torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=0.1))
    with pytest.raises(ValueError, match="not the module's"):
        mo.interop.from_torch(torch.optim.SGD([a], lr=0.1), torch.nn.Linear(1, 1))
