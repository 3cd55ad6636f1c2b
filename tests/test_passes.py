"""What is done to a compiled step's graph: the same numbers, fewer of them computed and held."""

import shutil
from collections import Counter

import pytest
import torch
from problems import close
from torch import nn
from torch._inductor import config as inductor
from torch.fx.experimental.proxy_tensor import make_fx

import metaopt as mo
from metaopt.inner import _passes

aten = torch.ops.aten


def count(graph):
    return Counter(str(node.target) for node in graph.nodes if node.op == "call_function")


def test_equal_subexpressions_are_joined_and_random_ones_are_not():
    def twice(x):
        towers = [(x @ x).tanh() + 1 for _ in range(2)] + [(x @ x).tanh() + 1.0]
        return sum(towers) + torch.rand_like(x) + torch.rand_like(x)

    traced = make_fx(twice)(torch.randn(3, 3))
    before = count(traced.graph)
    _passes.join(traced.graph)
    traced.recompile()
    after = count(traced.graph)
    assert before["aten.mm.default"] == 3 and after["aten.mm.default"] == 1 and after["aten.tanh.default"] == 1
    assert after["aten.rand_like.default"] == before["aten.rand_like.default"] == 2
    x = torch.randn(3, 3)
    torch.manual_seed(0)
    want = twice(x)
    torch.manual_seed(0)
    assert torch.allclose(traced(x), want)


@pytest.mark.filterwarnings("default")  # torch's own, while it compiles
@pytest.mark.parametrize(
    "operation", [lambda x, w: torch.add(x @ w, w, alpha=0.25), lambda x, w: torch.add(w, x @ w, alpha=0.25)]
)
def test_a_factor_in_a_sum_with_a_matrix_product_is_not_dropped(operation):
    """By inductor alone it is."""
    torch._dynamo.reset()
    xs = [torch.randn(3, 3, dtype=torch.float64) for _ in range(2)]
    w = torch.randn(3, 3, dtype=torch.float64)
    lam = torch.tensor(0.5).double()

    def loss(w, lam, x):
        return lam * operation(x, w).pow(2).mean()

    found = []
    for compile in (True, False):
        step = mo.inner_step(loss, mo.optim.SGD(lr=0.1, momentum=0.9))
        step, outer = (mo.compiled(step), mo.compiled(loss)) if compile else (step, loss)
        found.append(mo.hypergradient(step, outer, w, lam, xs, xs[0], estimator=mo.RMD()))
    assert step.compilation is None
    assert close(found[0].total, found[1].total, 1e-10) and close(found[0].outer_loss, found[1].outer_loss, 1e-10)
    traced = make_fx(operation)(xs[0], w)
    assert any(node.kwargs for node in traced.graph.nodes)
    _passes.spell_out(traced.graph)
    traced.recompile()
    assert not any(node.kwargs for node in traced.graph.nodes) and torch.allclose(traced(xs[0], w), operation(xs[0], w))


def test_a_graph_that_mutates_is_left_alone():
    traced = make_fx(lambda x: x.clone().add_(1) * x.clone().add_(1))(torch.ones(2))
    before = str(traced.graph)
    _passes.join(traced.graph)
    assert str(traced.graph) == before


def test_gradients_of_a_convolution_that_nobody_uses_are_not_computed():
    x = torch.randn(2, 3, 4, 4)
    weight = torch.randn(5, 3, 3, 3)

    def backward(g, x, weight):
        found = aten.convolution_backward(
            g, x, weight, [5], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]
        )
        return found[1]

    traced = make_fx(backward)(torch.ones(2, 5, 4, 4), x, weight)
    traced.graph.eliminate_dead_code()
    _passes.trim(traced.graph)
    traced.recompile()
    (node,) = (node for node in traced.graph.nodes if node.target is aten.convolution_backward.default)
    assert node.args[-1] == [False, True, False]
    g = torch.randn(2, 5, 4, 4)
    assert torch.equal(traced(g, x, weight), backward(g, x, weight))


@pytest.mark.filterwarnings("default")  # torch's own, while it compiles
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_what_was_pooled_is_noted_and_a_first_layer_computed_again(monkeypatch):
    torch._dynamo.reset()
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8, track_running_stats=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 2, 3, padding=1),
    )
    model = mo.functional(nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 1)).double())
    w, lam = mo.partition(model.params, weights=["0.*", "6.*"])
    batches = [(torch.randn(3, 1, 4, 4, dtype=torch.float64), torch.randn(3, 1, dtype=torch.float64)) for _ in range(3)]

    def loss(w, lam, batch):
        return (model(mo.merge(w, lam), batch[0]) - batch[1]).pow(2).mean()

    noted = []
    more = []
    note = _passes.note
    recompute = _passes.recompute

    def watched_note(graph):
        note(graph)
        noted.append(count(graph)["prims.inductor_force_stride_order.default"])

    def watched_recompute(graph):
        before = count(graph)["aten.convolution.default"]
        recompute(graph)
        more.append(count(graph)["aten.convolution.default"] - before)

    monkeypatch.setattr(_passes, "note", watched_note)
    monkeypatch.setattr(_passes, "recompute", watched_recompute)
    found = []
    for compile in (False, True):
        step = mo.inner_step(loss, mo.optim.SGD(lr=0.1))
        step = mo.compiled(step) if compile else step
        with inductor.patch(force_disable_caches=True):  # what comes from a cache has been through the passes before
            found.append(
                [mo.hypergradient(step, loss, w, lam, batches, batches[0], estimator=mo.RMD()).total for _ in range(2)]
            )
    assert step.compilation.refused is None
    assert set(noted) == {1}
    assert set(more) == {2}  # in the adjoint alone: the layer's output and its tangent
    assert close(found[0], found[1], 1e-12)


def held(x, weight, g, images, other):
    """A convolution used at once and again after a gradient of another one."""
    made = aten.convolution(x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    early = made.tanh().sum()
    gradient, _, _ = aten.convolution_backward(
        g, images, other, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, False, False]
    )
    return early, made * (1 + gradient.isnan().any())


@pytest.mark.parametrize(("channels", "again"), [(8, 2), (4, 1)])
def test_a_convolution_that_grows_is_computed_again_for_late_users(channels, again):
    arguments = (
        torch.randn(2, 1, 4, 4),
        torch.randn(channels, 1, 3, 3),
        torch.randn(2, 5, 4, 4),
        torch.randn(2, 3, 4, 4),
        torch.randn(5, 3, 3, 3),
    )
    traced = make_fx(held, tracing_mode="fake")(*arguments)
    _passes.recompute(traced.graph)
    traced.graph.lint()
    traced.recompile()
    convolutions = [node for node in traced.graph.nodes if node.target is aten.convolution.default]
    assert len(convolutions) == again
    for gradient in (1.0, float("inf"), float("nan")):  # the zero that is made of it is one
        arguments[2].fill_(gradient)
        assert all(torch.equal(a, b) for a, b in zip(traced(*arguments), held(*arguments), strict=True))
    if again == 2:
        first, second = convolutions
        assert {user.target for user in first.users} == {aten.tanh.default} and {
            user.target for user in second.users
        } == {aten.mul.Tensor}
        gradient = next(node for node in traced.graph.nodes if node.target is aten.convolution_backward.default)
        assert gradient in ancestors(second) and gradient not in ancestors(first)
        assert second.meta["val"].shape == first.meta["val"].shape


def test_element_wise_functions_are_computed_again_and_sums_are_not():
    def function(x, weight, g, images, other):
        made = aten.convolution(x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
        mean = made.mean()
        curve = (made - mean).tanh()
        gradient, _, _ = aten.convolution_backward(
            g, images, other, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, False, False]
        )
        return curve.sum(), curve * gradient.mean(), made

    arguments = (
        torch.randn(2, 1, 4, 4),
        torch.randn(8, 1, 3, 3),
        torch.randn(2, 5, 4, 4),
        torch.randn(2, 3, 4, 4),
        torch.randn(5, 3, 3, 3),
    )
    traced = make_fx(function, tracing_mode="fake")(*arguments)
    before = count(traced.graph)
    _passes.recompute(traced.graph)
    traced.graph.lint()
    traced.recompile()
    more = count(traced.graph) - before
    assert (more["aten.convolution.default"], more["aten.sub.Tensor"], more["aten.tanh.default"]) == (1, 1, 1)
    assert more["aten.mean.default"] == more["aten.sum.default"] == 0
    assert all(torch.equal(a, b) for a, b in zip(traced(*arguments), function(*arguments), strict=True))
    (output,) = (node for node in traced.graph.nodes if node.op == "output")
    assert output.args[0][2] is next(
        node for node in traced.graph.nodes if node.target is aten.convolution.default
    )  # what goes out is no late use


def ancestors(node):
    found = set()
    waiting = [node]
    while waiting:
        for above in waiting.pop().all_input_nodes:
            if above not in found:
                found.add(above)
                waiting.append(above)
    return found


def test_a_convolution_is_not_computed_again_where_nothing_tells_late_from_early():
    traced = make_fx(
        lambda x, weight: (lambda made: (made.tanh(), made.exp()))(nn.functional.conv2d(x, weight)), tracing_mode="fake"
    )(torch.randn(1, 1, 3, 3), torch.randn(9, 1, 1, 1))
    before = str(traced.graph)
    _passes.recompute(traced.graph)
    assert str(traced.graph) == before
