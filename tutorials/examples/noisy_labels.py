"""Noisy labels: a small network reads each example's loss and says how much the example counts."""

from functools import partial

import higher
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from weight_decay import data, network

import metaopt as mo

per_example = partial(cross_entropy, reduction="none")


def noisy():
    batches, clean = data()
    g = torch.Generator().manual_seed(0)
    wrong = [torch.rand(len(y), generator=g) < 0.4 for _, y in batches]
    return [(x, torch.where(w, (y + 1) % 10, y)) for (x, y), w in zip(batches, wrong, strict=True)], clean


def weight_net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(1, 20), nn.ReLU(), nn.Linear(20, 1)).double()


def adam(params):
    return torch.optim.Adam(params, lr=1e-2)


def ours(net, steps=10):
    batches, clean = noisy()
    model = mo.models.MetaWeightNet(mo.functional(net), per_example, mo.functional(weight_net()))
    step = mo.inner_step(model.inner_loss, mo.optim.SGD(lr=0.1))
    w, lam = model.init()
    reports = mo.online(
        step, model.outer_loss, w, lam, batches[:steps], [clean] * steps, estimator=mo.OneStep(), optimizer=adam
    )
    for report in mo.progress(reports):
        lam = report.lam
    print("weights of losses 0 … 5:", model.weights(lam, torch.linspace(0, 5, 6, dtype=torch.float64)))
    return [*report.state.w.values(), *lam.values()]


def theirs(net, steps=10):
    batches, (x_clean, y_clean) = noisy()
    weights = weight_net()
    outer = adam(weights.parameters())
    for x, y in batches[:steps]:
        outer.zero_grad()
        with higher.innerloop_ctx(net, torch.optim.SGD(net.parameters(), lr=0.1)) as (fast, inner):
            losses = per_example(fast(x), y)
            v = weights(losses.detach()[:, None])[:, 0].sigmoid()
            inner.step((v / v.sum() * losses).sum())
            gradients = torch.autograd.grad(cross_entropy(fast(x_clean), y_clean), weights.parameters())
            net.load_state_dict(fast.state_dict())
        for p, g in zip(weights.parameters(), gradients, strict=True):
            p.grad = g
        outer.step()
    return [*net.parameters(), *weights.parameters()]


def compared():
    return [ours(network()), theirs(network())]


if __name__ == "__main__":
    compared()
