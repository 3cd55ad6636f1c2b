"""What is done to a compiled step's graph: the same numbers, fewer of them computed and held."""

import shutil
from collections import Counter

import pytest
import torch
from test_compiled import close
from torch import nn
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


def test_a_graph_that_mutates_is_left_alone():
    traced = make_fx(lambda x: x.clone().add_(1) * x.clone().add_(1))(torch.ones(2))
    before = str(traced.graph)
    _passes.join(traced.graph)
    assert str(traced.graph) == before


def test_gradients_of_a_convolution_that_nobody_uses_are_not_computed():
    x, weight = torch.randn(2, 3, 4, 4), torch.randn(5, 3, 3, 3)

    def backward(g, x, weight):
        found = aten.convolution_backward(g, x, weight, [5], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False])
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
def test_what_was_pooled_is_noted(monkeypatch):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = mo.functional(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 1)).double())
    w, lam = mo.partition(model.params, weights=["4.*"])
    batches = [(torch.randn(3, 1, 4, 4, dtype=torch.float64), torch.randn(3, 1, dtype=torch.float64)) for _ in range(2)]

    def loss(w, lam, batch):
        return (model(mo.merge(w, lam), batch[0]) - batch[1]).pow(2).mean()

    noted, note = [], _passes.note

    def watched(graph):
        note(graph)
        noted.append(count(graph)["prims.inductor_force_stride_order.default"])

    monkeypatch.setattr(_passes, "note", watched)
    found = []
    for compile in (False, True):
        step = mo.inner_step(loss, mo.inner.SGD(lr=0.1), compile=compile)
        found.append([mo.hypergradient(step, loss, w, lam, batches, batches[0], mo.RMD()).total for _ in range(2)])
    assert step.compilation.refused is None
    assert noted == [0, 1]  # the step itself needs no derivative of the pooling; its adjoint does
    assert close(found[0], found[1], 1e-12)
