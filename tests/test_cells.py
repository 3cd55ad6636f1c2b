"""``model(params, …)`` beside ``torch.func.functional_call``, cell by cell: modules × what is computed × ways to wrap.

``functional_call`` is the reference: a difference means that ours is not the module the user wrote.
"""

import higher
import pytest
import torch
from torch import nn

import metaopt as mo

F64 = torch.float64
B = 4


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Sequential(nn.Linear(3, 3), nn.Tanh())})
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("shift", torch.linspace(-1, 1, 3))

    def forward(self, x, *, order=("a", "b")):
        for name in order:
            x = self.blocks[name](x)
        return x * self.scale + self.shift


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.read = nn.Linear(3, 7, bias=False)
        self.read.weight = self.embed.weight

    def forward(self, x):
        return self.read(self.embed(x).tanh())


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cells = kind(3, 4, batch_first=True)

    def forward(self, x):
        return self.cells(x)[0]


class Exponential(nn.Module):
    def forward(self, x):
        return x.exp()


def parametrised(layer):
    nn.utils.parametrize.register_parametrization(layer, "weight", Exponential())
    return layer


def flat(*shape):
    return lambda: torch.randn(B, *shape, dtype=F64)


def tokens():
    return torch.randint(0, 7, (B, 5))


# name -> module, inputs, keyword arguments of the call
CELLS = {
    "Linear": (lambda: nn.Linear(3, 2), flat(3), {}),
    "MLP": (lambda: nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 2)), flat(3), {}),
    "convolutions, batch norm, training": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.AvgPool2d(2)),
        flat(2, 6, 6),
        {},
    ),
    "convolutions, batch norm, evaluation": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh()).eval(),
        flat(2, 6, 6),
        {},
    ),
    "max pooling": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2)), flat(2, 6, 6), {}),
    "LayerNorm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), flat(3), {}),
    "GroupNorm": (lambda: nn.Sequential(nn.Conv1d(3, 4, 2), nn.GroupNorm(2, 4)), flat(3, 5), {}),
    "InstanceNorm": (lambda: nn.Sequential(nn.Conv1d(3, 4, 2), nn.InstanceNorm1d(4, affine=True)), flat(3, 5), {}),
    "GRU": (lambda: Recurrent(nn.GRU), flat(4, 3), {}),
    "LSTM": (lambda: Recurrent(nn.LSTM), flat(4, 3), {}),
    "Embedding": (lambda: nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 2)), tokens, {}),
    "tied weights": (Tied, tokens, {}),
    "Bilinear": (lambda: nn.Bilinear(3, 3, 2), lambda: (flat(3)(), flat(3)()), {}),
    "nested, buffers": (Nested, flat(3), {}),
    "keyword arguments": (Nested, flat(3), {"order": ("b", "a", "b")}),
    "parametrised": (lambda: parametrised(nn.Linear(3, 2)), flat(3), {}),
}
WRAPS = {
    "functional": mo.functional,
    "higher": lambda module: mo.interop.from_higher(higher.monkeypatch(module)),
}


def results(call, params, inputs, options):
    """The output, its gradient, and a Hessian-vector product of a scalar of it."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    out = call(leaves, *inputs, **options)
    weights = torch.linspace(0.5, 1.5, out.numel(), dtype=F64).reshape(out.shape)
    gradient = torch.autograd.grad((out.sin() * weights).sum(), list(leaves.values()), create_graph=True)
    along = sum((g * torch.full_like(g, 0.3)).sum() for g in gradient)
    product = torch.autograd.grad(along, list(leaves.values()), allow_unused=True)
    zeros = [torch.zeros_like(p) if x is None else x for x, p in zip(product, leaves.values(), strict=True)]
    return {"forward": [out], "gradient": list(gradient), "Hessian-vector product": zeros}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.filterwarnings("ignore:RNN module weights")
def test_model_is_functional_call(name, wrap):
    make, draw, options = CELLS[name]
    torch.manual_seed(0)
    module = make().double()
    inputs = draw()
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    model = WRAPS[wrap](module)
    params = {key: p + 0.1 for key, p in model.params.items()}
    got = results(model, params, inputs, options)
    again = results(model, params, inputs, options)

    def reference(leaves, *args, **kwargs):
        buffers = {key: value.clone() for key, value in module.named_buffers()}
        return torch.func.functional_call(module, (leaves, buffers), args, kwargs)

    want = results(reference, params, inputs, options)
    for what, values in want.items():
        assert any(float(x.detach().abs().max()) > 1e-3 for x in values), what
        for one, two, three in zip(values, got[what], again[what], strict=True):
            torch.testing.assert_close(two, one, rtol=1e-10, atol=1e-10, msg=lambda m, what=what: f"{what}: {m}")
            torch.testing.assert_close(three, two, rtol=0, atol=0)
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), key
