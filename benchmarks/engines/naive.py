"""The loop one would write by hand: functional_call and autograd.grad(create_graph=True) through all steps."""

import torch
from torch import Tensor
from torch.func import functional_call

import metaopt as mo
from benchmarks.problem import Problem


def gradient(problem: Problem) -> list[Tensor]:
    return unrolled(problem, lambda step, *args: step(*args))


def plain(problem: Problem) -> dict[str, Tensor]:
    """Training alone, by hand."""
    w, lam = mo.partition({name: p.detach() for name, p in problem.module.named_parameters()}, problem.weights)
    v = {name: torch.zeros_like(p) for name, p in w.items()}
    for x, y in problem.batches:
        w = {name: p.detach().requires_grad_() for name, p in w.items()}
        loss = problem.criterion(functional_call(problem.module, {**w, **lam}, (x,)), y)
        gradients = torch.autograd.grad(loss, list(w.values()))
        with torch.no_grad():
            v = {name: problem.momentum * v[name] + g for name, g in zip(w, gradients, strict=True)}
            w = {name: p - problem.lr * v[name] for name, p in w.items()}
    return w


def unrolled(problem: Problem, call) -> list[Tensor]:
    w, lam = mo.partition({name: p.detach() for name, p in problem.module.named_parameters()}, problem.weights)
    w = {name: p.clone().requires_grad_() for name, p in w.items()}
    lam = {name: p.clone().requires_grad_() for name, p in lam.items()}
    v = {name: torch.zeros_like(p) for name, p in w.items()}

    def loss(w, batch):
        return problem.criterion(functional_call(problem.module, {**w, **lam}, (batch[0],)), batch[1])

    def step(w, v, batch):
        gradients = torch.autograd.grad(loss(w, batch), list(w.values()), create_graph=True)
        v = {name: problem.momentum * v[name] + g for name, g in zip(w, gradients, strict=True)}
        return {name: p - problem.lr * v[name] for name, p in w.items()}, v

    for batch in problem.batches:
        w, v = call(step, w, v, batch)
    return list(torch.autograd.grad(loss(w, problem.outer_batch), list(lam.values())))
