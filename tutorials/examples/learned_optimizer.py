"""A learned optimiser: a small network turns gradients into steps; its loss is summed along the run."""

import torch
from torch import nn
from torch.func import functional_call

import metaopt as mo

STEPS = 20


def rule_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def valley(w):
    return (1 - w[..., 0]).square().mean() + (w[..., 1] - w[..., 0] ** 2).square().mean()


def starts():
    g = torch.Generator().manual_seed(0)
    return torch.randn(16, 2, generator=g, dtype=torch.float64)


def ours():
    rule = mo.functional(rule_network())

    def update(state, lam, batch):
        with torch.enable_grad():
            w = state.w if state.w.requires_grad else state.w.detach().requires_grad_()
            (g,) = torch.autograd.grad(valley(w), w, create_graph=True)
        momentum = 0.9 * state.slots + g
        w = state.w - 0.1 * rule(lam, torch.stack([g, momentum], -1)).squeeze(-1)
        return mo.InnerState(w, momentum, state.t + 1)

    step = mo.custom_step(update, init=lambda w, lam: mo.InnerState(w, torch.zeros_like(w)))
    lam = mo.tree.attach(rule.params)
    states = mo.unroll(step, starts(), lam, [None] * STEPS, at=range(1, STEPS + 1))
    loss = sum(valley(state.w) for state in states) / STEPS
    return torch.autograd.grad(loss, list(lam.values()))


def theirs():
    rule = rule_network()
    w = starts().requires_grad_()
    momentum = 0.0
    loss = 0.0
    for _ in range(STEPS):
        (g,) = torch.autograd.grad(valley(w), w, create_graph=True)
        momentum = 0.9 * momentum + g
        w = w - 0.1 * rule(torch.stack([g, momentum], -1)).squeeze(-1)
        loss = loss + valley(w) / STEPS
    return torch.autograd.grad(loss, list(rule.parameters()))


def compared():
    return [ours(), theirs()]


if __name__ == "__main__":
    for gradient in ours():
        print(gradient.norm())
