"""Modules as functions."""

import copy

import pytest
import torch
from torch import nn

import metaopt as mo

F64 = torch.float64


def second_derivatives_agree(module, x, prepare=lambda out: out.pow(2).sum()):
    """Hessian-vector product by double backward against a central difference of gradients."""
    model = mo.functional(module)
    params = {k: p.clone().requires_grad_() for k, p in model.params.items()}
    direction = {k: torch.randn_like(p) for k, p in params.items()}

    def gradient(at, graph=False):
        return torch.autograd.grad(prepare(model(at, x)), list(at.values()), create_graph=graph)

    slope = sum((g * direction[k]).sum() for k, g in zip(params, gradient(params, graph=True), strict=True))
    exact = torch.autograd.grad(slope, list(params.values()))
    h = 1e-5
    up, down = (
        gradient({k: (p + s * direction[k]).detach().requires_grad_() for k, p in params.items()}) for s in (h, -h)
    )
    for e, u, d in zip(exact, up, down, strict=True):
        assert torch.allclose(e, (u - d) / (2 * h), rtol=1e-5, atol=1e-6)


def test_equals_the_module_and_never_touches_it():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).double()
    x = torch.randn(8, 3, dtype=F64)
    model = mo.functional(module)
    reference = {k: v.clone() for k, v in module.state_dict().items()}
    out, buffers = model.with_buffers(model.params, model.buffers, x)
    assert all(torch.equal(v, reference[k]) for k, v in module.state_dict().items())
    assert torch.equal(out, module(x))  # this call moves the module's running statistics …
    assert all(torch.equal(v, buffers[k]) for k, v in module.named_buffers())  # … to what with_buffers returned
    assert torch.equal(model.buffers["1.running_mean"], reference["1.running_mean"])


def test_later_changes_of_the_module_are_not_seen():
    module = nn.Linear(2, 2)
    model = mo.functional(module)
    x = torch.ones(1, 2)
    before = model(model.params, x)
    with torch.no_grad():
        module.weight.zero_()
    assert torch.equal(model(model.params, x), before)


def test_modes():
    model = mo.functional(nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5)))
    x = torch.ones(4, 2)
    assert torch.equal(model.eval()(model.params, x), model.eval()(model.params, x))
    assert not torch.equal(model(model.params, x), model.eval()(model.params, x))


def test_tied_parameters_appear_once_and_stay_tied():
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    module[2].weight = module[0].weight
    model = mo.functional(module)
    x = torch.randn(5, 3, dtype=F64)
    assert set(model.params) == {"0.weight", "0.bias", "2.bias"}
    w = {k: p.clone().requires_grad_() for k, p in model.params.items()}
    ours = torch.autograd.grad(model(w, x).sum(), w["0.weight"])[0]
    theirs = torch.autograd.grad(module(x).sum(), module[0].weight)[0]
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_recurrent_networks(name):
    module = getattr(nn, name)(3, 4, batch_first=True).double()
    second_derivatives_agree(module, torch.randn(2, 5, 3, dtype=F64), lambda out: out[0].pow(2).sum())


def test_weight_norm_has_the_right_second_derivative():
    second_derivatives_agree(
        torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 4).double()), torch.randn(5, 3, dtype=F64)
    )
    second_derivatives_agree(
        torch.nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 3, 2).double(), dim=1), torch.randn(5, 2, 4, dtype=F64)
    )


def test_weight_norm_values_are_kept():
    module = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 4).double())
    model = mo.functional(module)
    x = torch.randn(5, 3, dtype=F64)
    assert torch.allclose(model(model.params, x), module(x), atol=1e-14)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_the_old_weight_norm_hook_is_refused():
    with pytest.raises(ValueError, match=r"parametrizations\.weight_norm"):
        mo.functional(torch.nn.utils.weight_norm(nn.Linear(2, 2)))


def test_partition_and_merge():
    model = mo.functional(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)))
    w, lam = mo.partition(model.params, weights=["1.*"])
    assert set(w) == {"1.weight", "1.bias"}
    assert mo.merge(w, lam).keys() == model.params.keys()
    again, _ = mo.partition(model.params, weights=lambda name: name.startswith("1."))
    assert set(again) == set(w)


def test_bad_input():
    model = mo.functional(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"nn\.Module"):
        mo.functional(lambda x: x)
    with pytest.raises(ValueError, match="no parameters"):
        mo.functional(nn.ReLU())
    with pytest.raises(ValueError, match="not initialised"):
        mo.functional(nn.LazyLinear(2))
    with pytest.raises(ValueError, match=r"missing \['bias'\], unknown \['bia'\]"):
        model({"weight": torch.ones(2, 2), "bia": torch.ones(2)}, torch.ones(1, 2))
    with pytest.raises(ValueError, match="'head' matches no parameter"):
        mo.partition(model.params, weights=["head"])
    with pytest.raises(ValueError, match="leaves no hyperparameters"):
        mo.partition(model.params, weights=["*"])
    with pytest.raises(ValueError, match="both"):
        mo.merge({"a": torch.ones(1)}, {"a": torch.ones(1)})


def test_parameters_are_put_back_after_an_error():
    model = mo.functional(nn.Linear(2, 2))
    good = model(model.params, torch.ones(1, 2))
    with pytest.raises(RuntimeError):
        model({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, torch.ones(1, 7))
    assert torch.equal(model(model.params, torch.ones(1, 2)), good)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 3), (3,)], ids=str)
def test_a_linear_layer_under_vmap(bias, shape):
    """Torch's numbers and second derivatives, with the weights of each task and with shared ones, and its dtype under autocast."""
    module = nn.Linear(3, 4, bias=bias)
    model = mo.functional(nn.Sequential(module))
    own = {name: torch.randn(2, *p.shape, dtype=torch.float64) for name, p in model.params.items()}
    shared = {name: p.double() for name, p in model.params.items()}
    x = torch.randn(2, *shape, dtype=torch.float64)
    for params, dims in ((own, (0, 0)), (shared, (None, 0))):
        leaves = [p.requires_grad_() for p in params.values()]
        found = []
        for call in (lambda p, x: model(p, x), lambda p, x: nn.functional.linear(x, p["0.weight"], p.get("0.bias"))):
            y = torch.vmap(call, in_dims=dims)(params, x)
            first = torch.autograd.grad(y.pow(3).sum(), leaves, create_graph=True)
            found.append([y, *first, *torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)])
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = torch.vmap(model, in_dims=(None, 0))({name: p.detach() for name, p in model.params.items()}, x.float())
    assert y.dtype == torch.bfloat16


def test_models_weights_and_batches_move_in_one_way():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    net[0].requires_grad_(False)
    model = mo.functional(net)
    double = model.to(torch.float64)
    batch = {"x": torch.randn(5, 3), "y": torch.arange(5), "name": "five"}
    moved = mo.tree.to(batch, torch.float64)
    assert (moved["x"].dtype, moved["y"].dtype, moved["name"]) == (torch.float64, torch.int64, "five")
    expected = copy.deepcopy(net).double()(moved["x"])
    torch.testing.assert_close(double(double.params, moved["x"]), expected, rtol=1e-12, atol=1e-12)
    assert {p.dtype for p in [*double.params.values(), *double.frozen.values()]} == {torch.float64}
    assert {p.dtype for p in model.params.values()} == {torch.float32}
    assert net[0].weight.dtype == torch.float32
    away = model.to("meta")
    everything = [
        *away.params.values(),
        *away.frozen.values(),
        *away.buffers.values(),
        *mo.tree.to([net[0].bias], "meta"),
    ]
    assert {x.device.type for x in everything} == {"meta"}
    with pytest.raises(ValueError, match="has not moved them"):
        model.eval().to(torch.float64)(double.params, moved["x"])
