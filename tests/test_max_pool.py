"""Max pooling inside a wrapped model: torch's numbers and derivatives, to the bit."""

import pytest
import torch
from cases import check_under_transforms
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import metaopt as mo
from metaopt.layers import max_pool, sequence

F64 = torch.float64


def torchs(x):
    return nn.functional.max_pool2d(x, 2)


@given(st.integers(0, 5), st.sampled_from([(1, 1, 2, 2), (3, 2, 4, 6), (2, 3, 6, 2)]), st.booleans(), st.booleans())
def test_every_derivative_is_torchs(seed, shape, ties, channels_last):
    torch.manual_seed(seed)
    x = torch.randint(0, 3, shape).to(F64) if ties else torch.randn(shape, dtype=F64)
    x = (x.to(memory_format=torch.channels_last) if channels_last else x).requires_grad_()
    half = (*shape[:2], shape[2] // 2, shape[3] // 2)
    g = torch.randn(half, dtype=F64, requires_grad=True)
    u = torch.randn(shape, dtype=F64, requires_grad=True)
    found = []
    for pool in (max_pool._Pool.apply, torchs):
        y = pool(x)
        (first,) = torch.autograd.grad(y, x, g, create_graph=True)
        (second,) = torch.autograd.grad(first, g, u, create_graph=True)
        (third,) = torch.autograd.grad(second, u, g, retain_graph=True)
        found.append([y, first, second, third])
        if not channels_last:  # many cotangents at once are beyond torch's pooling in that format
            found[-1] += torch.autograd.grad(y, x, torch.stack([g, 2.0 * g]), is_grads_batched=True, retain_graph=True)
            found[-1] += torch.autograd.grad(
                first, g, torch.stack([u, 2.0 * u]), is_grads_batched=True, retain_graph=True
            )
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(max_pool.forward(nn.MaxPool2d(2), x.detach()), found[1][0])


def test_no_number_stays_no_number():
    x = torch.randn(1, 2, 4, 4)
    x[0, 0, 1, 2] = float("nan")
    for at in (x, x.clone().requires_grad_()):
        assert torch.equal(max_pool.forward(nn.MaxPool2d(2), at).isnan(), torchs(at).isnan())


LAYERS = {
    "2": nn.MaxPool2d(2),
    "3": nn.MaxPool2d(3),
    "stride": nn.MaxPool2d(2, stride=1),
    "padding": nn.MaxPool2d(2, padding=1),
    "dilation": nn.MaxPool2d(2, dilation=2),
    "ceil": nn.MaxPool2d(2, ceil_mode=True),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("size", [(2, 3, 6, 6), (2, 3, 7, 6), (3, 6, 6)])
def test_a_wrapped_layer_is_the_layer(name, size):
    net = nn.Sequential(nn.Conv2d(3, 3, 1), LAYERS[name]).double()
    model = mo.functional(net)
    x = torch.randn(size, dtype=F64)
    gradients = []
    for call in (lambda at: model(model.params, at), net):
        at = x.clone().requires_grad_()
        out = call(at)
        gradients.append((out, *torch.autograd.grad(out.pow(2).sum(), at)))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        assert torch.equal(model(model.params, x), net(x))
    assert type(net[1]) is nn.MaxPool2d


def test_under_transforms_it_is_torchs():
    model = mo.functional(nn.Sequential(nn.Conv2d(1, 2, 1), nn.MaxPool2d(2)).double())
    x = torch.randn(2, 1, 4, 4, dtype=F64)

    def loss(x):
        return model(model.params, x).pow(2).sum()

    check_under_transforms(loss, x)


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.MaxPool2d(3, stride=2, padding=1), nn.MaxPool2d(3, stride=1)])
@pytest.mark.parametrize("ties", [False, True])
def test_relu_and_pooling_change_places(pool, ties):
    torch.manual_seed(0)
    x = torch.randint(-2, 3, (4, 3, 6, 6)).to(F64) if ties else torch.randn(4, 3, 6, 6, dtype=F64)
    module = nn.Sequential(nn.ReLU(), pool, nn.Conv2d(3, 2, 1)).double()
    model = mo.functional(module)
    assert [type(layer) for layer in sequence.orders(module)[0][1]] == [nn.MaxPool2d, nn.ReLU, nn.Conv2d]
    seen = []
    for run in (module, lambda x: model(model.params, x)):
        at = x.clone().requires_grad_()
        y = run(at)
        g = torch.linspace(-1, 1, y.numel(), dtype=F64).view_as(y).requires_grad_()
        (first,) = torch.autograd.grad(y, at, g, create_graph=True)
        (second,) = torch.autograd.grad(first, g, torch.cos(x))
        seen.append((y, first, second))
    for theirs, ours in zip(*seen, strict=True):
        assert torch.equal(theirs, ours)


def watched(layer):
    layer.register_forward_hook(lambda module, args, out: None)
    return layer


def block(relu=None, pool=None):
    return [nn.Conv2d(3, 3, 3, padding=1), relu or nn.ReLU(), pool or nn.MaxPool2d(2)]


class Own(nn.Module):
    """Writes into what its sequence gives."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Sequential(*block()), nn.Flatten())

    def forward(self, x):
        return self.body(x).add_(1)


ORDERS = {
    "a convolution follows": (nn.Sequential(*block(), nn.Conv2d(3, 3, 1)), 1),
    "blocks": (nn.Sequential(nn.Sequential(*block()), nn.Sequential(*block()), nn.Flatten(), nn.Linear(12, 2)), 2),
    "the last": (nn.Sequential(*block()), 0),
    "a view is the last": (nn.Sequential(*block(), nn.Flatten()), 0),
    "in place": (nn.Sequential(*block(nn.ReLU(inplace=True)), nn.Flatten(), nn.Linear(48, 2)), 0),
    "dropout in place": (nn.Sequential(*block(), nn.Dropout(0.0, inplace=True), nn.Flatten(), nn.Linear(48, 2)), 0),
    "a view in place": (nn.Sequential(*block(), nn.Flatten(), nn.ELU(inplace=True), nn.Linear(48, 2)), 0),
    "a watched ReLU": (nn.Sequential(*block(watched(nn.ReLU())), nn.Flatten(), nn.Linear(48, 2)), 0),
    "a watched view": (nn.Sequential(*block(), watched(nn.Flatten()), nn.Linear(48, 2)), 0),
    "a watched block": (nn.Sequential(watched(nn.Sequential(*block())), nn.Flatten(), nn.Linear(48, 2)), 0),
    "a module of the user's": (Own(), 0),
}


@pytest.mark.parametrize("name", ORDERS)
def test_a_relu_comes_later_where_nobody_can_see_it(name):
    module, count = ORDERS[name]
    module = module.double()
    assert len(sequence.orders(module)) == count
    model = mo.functional(module)
    x = torch.randn(2, 3, 8, 8, dtype=F64)
    w = {key: p.requires_grad_() for key, p in model.params.items()}
    ours = torch.autograd.grad(model(w, x).pow(2).sum(), list(w.values()))
    theirs = torch.autograd.grad(module(x).pow(2).sum(), list(module.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
