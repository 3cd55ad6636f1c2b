"""MAML: initial weights from which a few gradient steps fit a new task."""

import higher
import torch
from torch import nn
from torch.nn.functional import mse_loss

import metaopt as mo


def sample(run, tasks=4, points=10):
    """A meta-batch of sine waves: five support batches (the same one), and a query batch."""
    g = torch.Generator().manual_seed(run)
    amplitude = 0.1 + 4.9 * torch.rand(tasks, 1, 1, generator=g, dtype=torch.float64)
    phase = torch.pi * torch.rand(tasks, 1, 1, generator=g, dtype=torch.float64)
    x = 10 * torch.rand(2, tasks, points, 1, generator=g, dtype=torch.float64) - 5
    support, query = [(x[i], amplitude * (x[i] - phase).sin()) for i in range(2)]
    return [support] * 5, query


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 1)).double()


def adam(params):
    return torch.optim.Adam(params, lr=1e-2)


def ours(net, runs=3):
    maml = mo.models.MAML.of(net, mse_loss)
    step = maml.step(mo.optim.SGD(lr=0.01))
    w, phi = maml.init()
    history = mo.History()
    for report in mo.progress(mo.tune(step, maml.objective(), w, phi, tasks=sample, optimizer=adam, runs=runs), history):
        phi = report.lam
    print(history)
    print("new tasks:", mo.evaluate(step, maml.outer_loss, w, phi, *sample(0)))
    net.load_state_dict(phi, strict=False)


def theirs(net, runs=3):
    outer = adam(net.parameters())
    for run in range(1, runs + 1):
        batches, (query_x, query_y) = sample(run)
        outer.zero_grad()
        for i in range(len(query_x)):
            inner = torch.optim.SGD(net.parameters(), lr=0.01)
            with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fast, steps):
                for x, y in batches:
                    steps.step(mse_loss(fast(x[i]), y[i]))
                (mse_loss(fast(query_x[i]), query_y[i]) / len(query_x)).backward()
        outer.step()


def compared():
    nets = [network(), network()]
    ours(nets[0])
    theirs(nets[1])
    return [list(net.parameters()) for net in nets]


if __name__ == "__main__":
    compared()
