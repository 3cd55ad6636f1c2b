"""A learned loss: a small network of prediction and target, meta-trained so that descending it helps."""

import higher
import torch
from maml import adam, network, sample
from torch import nn
from torch.nn.functional import mse_loss

import metaopt as mo


def loss_network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 1), nn.Softplus()).double()


def ours(net, runs=3):
    model = mo.functional(net)
    learned = mo.functional(loss_network())

    def inner_loss(w, lam, batch):
        return learned(lam, torch.cat([model(w, batch[0]), batch[1]], 1)).mean()

    def outer_loss(w, lam, batch):
        return mse_loss(model(w, batch[0]), batch[1])

    step = mo.inner_step(mo.vmapped(inner_loss), mo.optim.SGD(lr=0.1, momentum=0.9))
    objective = mo.vmapped(outer_loss, reduction="mean")
    reports = mo.tune(step, objective, model.params, learned.params, tasks=sample, optimizer=adam, runs=runs)
    for report in mo.progress(reports):
        lam = report.lam
    print("new tasks:", mo.evaluate(step, outer_loss, model.params, lam, *sample(0)))
    return list(lam.values())


def theirs(net, runs=3):
    learned = loss_network()
    outer = adam(learned.parameters())
    for run in range(1, runs + 1):
        batches, (query_x, query_y) = sample(run)
        outer.zero_grad()
        for i in range(len(query_x)):
            with higher.innerloop_ctx(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)) as (fast, steps):
                for x, y in batches:
                    steps.step(learned(torch.cat([fast(x[i]), y[i]], 1)).mean())
                (mse_loss(fast(query_x[i]), query_y[i]) / len(query_x)).backward()
        outer.step()
    return list(learned.parameters())


def compared():
    return [ours(network()), theirs(network())]


if __name__ == "__main__":
    compared()
