"""ANIL: the head adapts to each task; the body, and where the head starts, are learned."""

import higher
import torch
from maml import adam, network, sample
from torch.nn.functional import mse_loss

import metaopt as mo


def ours(net, runs=3):
    anil = mo.models.MAML.of(net, mse_loss, weights=["2.*"])
    step = anil.step(mo.optim.SGD(lr=0.01))
    w, lam = anil.init()
    for report in mo.progress(mo.tune(step, anil.objective(), w, lam, tasks=sample, optimizer=adam, runs=runs)):
        lam = report.lam
    print("new tasks:", mo.evaluate(step, anil.outer_loss, w, lam, *sample(0)))
    net.load_state_dict(lam, strict=False)


def theirs(net, runs=3):
    outer = adam(net.parameters())
    for run in range(1, runs + 1):
        batches, (query_x, query_y) = sample(run)
        outer.zero_grad()
        for i in range(len(query_x)):
            body = net[:2]
            head = net[2]
            inner = torch.optim.SGD(head.parameters(), lr=0.01)
            with higher.innerloop_ctx(head, inner, copy_initial_weights=False) as (fast, steps):
                for x, y in batches:
                    steps.step(mse_loss(fast(body(x[i])), y[i]))
                (mse_loss(fast(body(query_x[i])), query_y[i]) / len(query_x)).backward()
        outer.step()


def compared():
    nets = [network(), network()]
    ours(nets[0])
    theirs(nets[1])
    return [list(net.parameters()) for net in nets]


if __name__ == "__main__":
    compared()
