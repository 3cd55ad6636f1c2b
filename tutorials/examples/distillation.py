"""Dataset distillation: ten images, one per digit, from which a network learns all ten."""

import higher
import torch
from torch.nn.functional import cross_entropy
from weight_decay import data, network

import metaopt as mo

LABELS = torch.arange(10)
STEPS = 5


def start():
    g = torch.Generator().manual_seed(0)
    return {"x": torch.rand(10, 64, generator=g, dtype=torch.float64), "lr": torch.tensor(0.5, dtype=torch.float64)}


def adam(params):
    return torch.optim.Adam(params, lr=0.05)


def ours(net, runs=2):
    _, real = data()
    model = mo.functional(net)
    inner_loss = lambda w, lam, _: cross_entropy(model(w, lam["x"]), LABELS)  # noqa: E731
    outer_loss = lambda w, lam, batch: cross_entropy(model(w, batch[0]), batch[1])  # noqa: E731
    step = mo.inner_step(inner_loss, mo.optim.SGD(lr=mo.by("lr")))
    problem = mo.Problem(step, outer_loss, model.params, start(), [None] * STEPS, real)
    for report in mo.progress(problem.tune(optimizer=adam, runs=runs)):
        print(report)
    return list(report.lam.values())


def theirs(net, runs=2):
    _, (x, y) = data()
    lam = {name: value.requires_grad_() for name, value in start().items()}
    outer = adam(lam.values())
    for _ in range(runs):
        outer.zero_grad()
        inner = torch.optim.SGD(net.parameters(), lr=1.0)
        with higher.innerloop_ctx(net, inner, override={"lr": [lam["lr"]]}) as (fast, steps):
            for _ in range(STEPS):
                steps.step(cross_entropy(fast(lam["x"]), LABELS))
            cross_entropy(fast(x), y).backward()
        outer.step()
    return list(lam.values())


def compared():
    return [ours(network()), theirs(network())]


if __name__ == "__main__":
    compared()
