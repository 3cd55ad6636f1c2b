"""TorchOpt's functional optimiser in the hand-written loop (optional extra ``bench``)."""

import torch
import torchopt
from torch import Tensor
from torch.func import functional_call

import metaopt as mo
from benchmarks.problem import Problem


def gradient(problem: Problem) -> list[Tensor]:
    w, lam = mo.partition({name: p.detach() for name, p in problem.module.named_parameters()}, problem.weights)
    w = {name: p.clone().requires_grad_() for name, p in w.items()}
    lam = {name: p.clone().requires_grad_() for name, p in lam.items()}
    optimizer = torchopt.sgd(lr=problem.lr, momentum=problem.momentum, moment_requires_grad=True)
    state = optimizer.init(w)

    def loss(w, batch):
        return problem.criterion(functional_call(problem.module, {**w, **lam}, (batch[0],)), batch[1])

    for batch in problem.batches:
        gradients = dict(zip(w, torch.autograd.grad(loss(w, batch), list(w.values()), create_graph=True), strict=True))
        updates, state = optimizer.update(gradients, state, params=w, inplace=False)
        w = torchopt.apply_updates(w, updates, inplace=False)
    return list(torch.autograd.grad(loss(w, problem.outer_batch), list(lam.values())))
