"""A weight decay for each layer of a classifier, tuned on validation data; a killed run goes on."""

import higher
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import metaopt as mo

START = 1e-3


def data():
    x, y = load_digits(return_X_y=True)
    x = torch.from_numpy(x) / 16
    y = torch.from_numpy(y)
    return [(x[100 * t : 100 * t + 100], y[100 * t : 100 * t + 100]) for t in range(10)], (x[1000:1300], y[1000:1300])


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()


def adam(params):
    return torch.optim.Adam(params, lr=0.3)


def ours(net, runs=2, checkpoint=None):
    batches, validation = data()
    model = mo.functional(net)
    decay = mo.by("decay", mo.optim.positive)
    step = mo.inner_step(lambda w, lam, b: cross_entropy(model(w, b[0]), b[1]), mo.optim.SGD(lr=0.5, weight_decay=decay))
    start = mo.optim.positive.inverse(torch.tensor(START, dtype=torch.float64))
    lam = {"decay": {"0.*": start, "2.*": start.clone()}}
    outer_loss = lambda w, lam, b: cross_entropy(model(w, b[0]), b[1])  # noqa: E731
    history = mo.History()
    problem = mo.Problem(step, outer_loss, model.params, lam, batches, validation)
    for report in mo.progress(problem.tune(optimizer=adam, runs=runs, checkpoint=checkpoint), history):
        lam = report.lam
    print(history)
    return list(lam["decay"].values())


def theirs(net, runs=2):
    batches, (x_val, y_val) = data()
    logs = [torch.tensor(START, dtype=torch.float64).log().requires_grad_() for _ in range(2)]
    outer = adam(logs)
    for _ in range(runs):
        outer.zero_grad()
        with higher.innerloop_ctx(net, torch.optim.SGD(net.parameters(), lr=0.5)) as (fast, steps):
            for x, y in batches:
                layers = [fast[0].weight, fast[0].bias], [fast[2].weight, fast[2].bias]
                decay = sum(a.exp() * sum(p.square().sum() for p in ps) / 2 for a, ps in zip(logs, layers, strict=True))
                steps.step(cross_entropy(fast(x), y) + decay)
            cross_entropy(fast(x_val), y_val).backward()
        outer.step()
    return logs


def compared():
    return [ours(network()), theirs(network())]


if __name__ == "__main__":
    compared()
