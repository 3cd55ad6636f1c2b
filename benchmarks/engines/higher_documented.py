"""`higher` as its README shows it.

The whole module is patched, λ's learning rate is zero, gradients to the initial parameters.
"""

import higher
import torch
from torch import Tensor

import metaopt as mo
from benchmarks.problem import Problem


def gradient(problem: Problem) -> list[Tensor]:
    w, lam = mo.partition(dict(problem.module.named_parameters()), problem.weights)
    groups = [{"params": list(w.values())}, {"params": list(lam.values()), "lr": 0.0, "momentum": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=problem.lr, momentum=problem.momentum)
    with higher.innerloop_ctx(problem.module, optimizer, copy_initial_weights=False) as (net, inner):
        for x, y in problem.batches:
            inner.step(problem.criterion(net(x), y))
        x, y = problem.outer_batch
        return list(torch.autograd.grad(problem.criterion(net(x), y), list(lam.values())))
