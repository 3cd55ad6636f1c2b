"""Meta-SGD: initial weights and a learning rate for each of them."""

import torch
from maml import adam, network, sample
from torch.func import functional_call
from torch.nn.functional import mse_loss

import metaopt as mo


def ours(net, runs=3):
    meta_sgd = mo.models.MetaSGD.of(net, mse_loss, rate=0.01)
    step = meta_sgd.step(meta_sgd.optimizer)
    w, lam = meta_sgd.init()
    for report in mo.progress(mo.tune(step, meta_sgd.objective(), w, lam, tasks=sample, optimizer=adam, runs=runs)):
        lam = report.lam
    print("new tasks:", mo.evaluate(step, meta_sgd.outer_loss, w, lam, *sample(0)))
    net.load_state_dict(lam["initial"], strict=False)
    return lam


def theirs(net, runs=3):
    rates = {name: torch.full_like(p, 0.01).requires_grad_() for name, p in net.named_parameters()}
    outer = adam([*net.parameters(), *rates.values()])
    for run in range(1, runs + 1):
        batches, (query_x, query_y) = sample(run)
        outer.zero_grad()
        for i in range(len(query_x)):
            fast = dict(net.named_parameters())
            for x, y in batches:
                loss = mse_loss(functional_call(net, fast, (x[i],)), y[i])
                gradients = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
                fast = {k: p - rates[k] * g for (k, p), g in zip(fast.items(), gradients, strict=True)}
            (mse_loss(functional_call(net, fast, (query_x[i],)), query_y[i]) / len(query_x)).backward()
        outer.step()
    return rates


def compared():
    nets = [network(), network()]
    learned = ours(nets[0])
    rates = theirs(nets[1])
    return [[*nets[0].parameters(), *learned["lr"].values()], [*nets[1].parameters(), *rates.values()]]


if __name__ == "__main__":
    compared()
