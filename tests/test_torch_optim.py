"""``torch.optim`` is the reference: its options, weights without a gradient, and the way there and back."""

import inspect

import pytest
import torch
from cases import OPTIMIZERS, ids
from torch import nn

import metaopt as mo
from metaopt import tree
from metaopt.interop._torch_table import REFUSED, TABLE, WITHOUT_EFFECT

F64 = torch.float64
with_torch = [case for case in OPTIMIZERS if case.torch is not None]
T = 6


@pytest.fixture(autouse=True)
def _double():
    """torch keeps some slots as numbers of the default dtype."""
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


class TwoHeads(nn.Module):
    """The second head is used at the steps whose batch says so."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.first = nn.Linear(4, 2)
        self.second = nn.Linear(4, 2)

    def forward(self, x, both):
        hidden = torch.tanh(self.body(x))
        return self.first(hidden) + self.second(hidden) if both else self.first(hidden)


def batches():
    source = torch.Generator().manual_seed(0)
    return [(torch.randn(5, 3, generator=source), t % 3 == 2) for t in range(T)]


def matrices_only(case):
    return case.name.startswith("Muon")


@pytest.mark.filterwarnings("ignore:the inner loss gives no gradient")
@pytest.mark.parametrize("case", with_torch, ids=ids(with_torch))
def test_a_weight_without_gradient_stays_with_its_slots_and_its_own_count(case):
    torch.manual_seed(0)
    net = TwoHeads()
    if matrices_only(case):
        for layer in (net.body, net.first, net.second):
            layer.bias = None
    model = mo.functional(net)
    step = mo.inner_step(lambda w, lam, batch: model(w, *batch).pow(2).sum(), case.make())
    state = step.init(model.params, None)
    theirs = case.torch(list(net.parameters()))
    for batch in batches():
        state = step(state, None, batch)
        theirs.zero_grad(set_to_none=True)
        net(*batch).pow(2).sum().backward()
        theirs.step()
    for name, p in net.named_parameters():
        torch.testing.assert_close(state.w[name], p.detach(), rtol=1e-11, atol=1e-12)


@pytest.mark.filterwarnings("ignore:the inner loss gives no gradient")
@pytest.mark.parametrize("estimator", [mo.RMD(), mo.RMD(mo.trajectory.Graphs()), mo.FMD()], ids=repr)
@pytest.mark.parametrize("case", OPTIMIZERS, ids=ids(OPTIMIZERS))
def test_hypergradients_through_steps_that_miss_weights_are_autograds(case, estimator):
    torch.manual_seed(0)
    net = TwoHeads()
    if matrices_only(case):
        for layer in (net.body, net.first, net.second):
            layer.bias = None
    model = mo.functional(net)
    step = mo.inner_step(lambda w, lam, batch: (lam * model(w, *batch)).pow(2).sum(), case.make())

    def outer(w, lam, batch):
        return model(w, batch[0], True).sin().sum()

    lam = torch.tensor([0.5, 0.7])
    data = batches()
    found = mo.hypergradient(step, outer, model.params, lam, data, data[0], estimator=estimator).total
    lam_ = lam.clone().requires_grad_()
    state = step.init(model.params, lam_)
    for batch in data:
        state = step(state, lam_, batch)
    (expected,) = torch.autograd.grad(outer(state.w, lam_, data[0]), lam_)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.filterwarnings("ignore:the inner loss gives no gradient")
def test_compiled_steps_miss_the_same_weights():
    torch.manual_seed(0)
    model = mo.functional(TwoHeads())
    runs = []
    for backend in (False, "aot_eager"):
        step = mo.inner_step(
            lambda w, lam, x: model(w, x, False).pow(2).sum(),
            mo.optim.SGD(lr=0.1, momentum=0.9, weight_decay=0.1),
        )
        step = mo.compiled(step, backend=backend) if backend else step
        state = step.init(model.params, None)
        for x, _ in batches():
            state = step(state, None, x)
        runs.append(state)
    torch.testing.assert_close(runs[0].w, runs[1].w)
    assert torch.equal(runs[1].w["second.weight"], model.params["second.weight"])


# -- options -------------------------------------------------------------------------------------
TORCH = [
    cls
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
]


@pytest.mark.parametrize("cls", TORCH, ids=lambda cls: cls.__name__)
def test_every_option_of_every_optimiser_of_torch_is_taken_over_or_refused(cls):
    if cls in REFUSED:
        assert cls not in TABLE
        return
    options = set(inspect.signature(cls).parameters) - {"params"}
    row = TABLE[cls]
    known = {*row.settings, *WITHOUT_EFFECT, "maximize"} | ({"decoupled_weight_decay"} if row.decoupled else set())
    assert options <= known


def test_a_new_option_is_refused_by_name():
    net = nn.Linear(2, 1)
    theirs = torch.optim.SGD(net.parameters(), lr=0.1)
    theirs.defaults["fancy"] = theirs.param_groups[0]["fancy"] = True
    with pytest.raises(ValueError, match="the option fancy=True is not known"):
        mo.interop.from_torch(theirs, net)


@pytest.mark.parametrize("cls", list(REFUSED), ids=lambda cls: cls.__name__)
def test_optimisers_without_counterpart_are_refused_with_the_remedy(cls):
    with pytest.raises(TypeError, match="no differentiable counterpart"):
        mo.interop.from_torch(cls(list(nn.Linear(2, 1).parameters())))


def test_decoupled_weight_decay_of_adam():
    net = nn.Linear(2, 1)
    ours = mo.interop.from_torch(
        torch.optim.Adam(net.parameters(), lr=0.1, weight_decay=0.5, decoupled_weight_decay=True), net
    )
    assert type(ours) is mo.optim.AdamW


def test_hooks_on_the_step_are_refused_and_a_scheduler_is_told():
    net = nn.Linear(2, 1)
    theirs = torch.optim.SGD(net.parameters(), lr=0.1)
    theirs.register_step_post_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hooks on its step"):
        mo.interop.from_torch(theirs, net)
    theirs = torch.optim.SGD(net.parameters(), lr=0.1)
    torch.optim.lr_scheduler.StepLR(theirs, 2)
    with pytest.warns(UserWarning, match="scheduler is attached"):
        mo.interop.from_torch(theirs, net)


# -- there and back ------------------------------------------------------------------------------
def trained(net, optimizer, steps, seed=1):
    source = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(5, 3, generator=source), True).pow(2).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("case", with_torch, ids=ids(with_torch))
def test_there_and_back_is_one_run(case):
    """Two steps of torch, two of ours, two of torch: as six of torch."""
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        net = TwoHeads()
        if matrices_only(case):
            for layer in (net.body, net.first, net.second):
                layer.bias = None
        nets.append(net)
    alone, shared = nets
    whole = case.torch(list(alone.parameters()))
    source = torch.Generator().manual_seed(1)
    xs = [torch.randn(5, 3, generator=source) for _ in range(6)]

    def steps_of_torch(net, optimizer, some):
        for x in some:
            optimizer.zero_grad()
            net(x, True).pow(2).sum().backward()
            optimizer.step()

    steps_of_torch(alone, whole, xs)
    theirs = case.torch(list(shared.parameters()))
    steps_of_torch(shared, theirs, xs[:2])
    model = mo.functional(shared)
    step = mo.inner_step(lambda w, lam, x: model(w, x, True).pow(2).sum(), mo.interop.from_torch(theirs, shared))
    state = step.init(model.params, None)
    for x in xs[2:4]:
        state = step(state, None, x)
    mo.interop.load(shared, state.w)
    theirs.load_state_dict(mo.interop.to_torch(state, theirs, shared))
    steps_of_torch(shared, theirs, xs[4:])
    for p, q in zip(alone.parameters(), shared.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("started", [False, True])
def test_an_optimiser_over_some_parameters_leaves_the_others(started):
    net = TwoHeads()
    theirs = torch.optim.Adam(net.first.parameters(), lr=0.1)
    if started:
        trained(net, theirs, 2)
    model = mo.functional(net)
    step = mo.inner_step(lambda w, lam, x: model(w, x, True).pow(2).sum(), mo.interop.from_torch(theirs, net))
    state = step(step.init(model.params, None), None, torch.ones(5, 3))
    moved = {name for name, p in model.params.items() if not torch.equal(p, state.w[name])}
    assert moved == {"first.weight", "first.bias"}


def test_weights_are_written_back_by_name():
    net = nn.Linear(2, 1)
    mo.interop.load(net, {"bias": torch.tensor([5.0])})
    assert net.bias.item() == 5.0
    with pytest.raises(ValueError, match="no parameter 'bais'"):
        mo.interop.load(net, {"bais": torch.tensor([5.0])})
    with pytest.raises(ValueError, match=r"shape \(1,\)"):
        mo.interop.load(net, {"bias": torch.zeros(2)})


@pytest.mark.parametrize(
    "make", [mo.optim.Adam, mo.optim.AdamW, mo.optim.NAdam, mo.optim.RMSprop, mo.optim.Adagrad, mo.optim.Adamax]
)
def test_a_zero_gradient_in_float16_is_finite(make):
    w = torch.ones(3, dtype=torch.float16)
    ours = make(lr=0.1)
    w, slots = ours.update(torch.zeros_like(w), w, ours.init(w), None, 1)
    assert tree.is_finite((w, slots))
