"""A small transformer: which training text helps on the validation text? One weight per example, exactly."""

from functools import partial

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import metaopt as mo

TEXT = (
    "the inner loop fits the weights to the data that it is given. the outer loop asks how the data should have been "
    "weighted, so that the weights would be better on the text that matters. both are gradients. "
)
LENGTH = 12
STEPS = 12


class Transformer(nn.Module):
    def __init__(self, symbols, width=16):
        super().__init__()
        self.embed = nn.Embedding(symbols, width)
        self.place = nn.Parameter(0.1 * torch.randn(LENGTH, width))
        self.mix = nn.Linear(width, 3 * width)
        self.norm = nn.LayerNorm(width)
        self.think = nn.Linear(width, width)
        self.read = nn.Linear(width, symbols)

    def forward(self, x):
        h = self.embed(x) + self.place
        q, k, v = self.mix(h).chunk(3, -1)
        future = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        h = h + (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(future, -torch.inf).softmax(-1) @ v
        return self.read(h + self.think(self.norm(h)).tanh())


def data():
    symbols = sorted(set(TEXT))
    ids = torch.tensor([symbols.index(c) for c in TEXT])
    windows = ids.unfold(0, LENGTH + 1, 5)
    x = windows[:, :-1]
    y = windows[:, 1:]
    g = torch.Generator().manual_seed(0)
    which = [torch.randint(len(x) - 8, (8,), generator=g) for _ in range(STEPS)]
    return [(x[i], y[i], i) for i in which], (x[-8:], y[-8:]), len(x) - 8


def network():
    torch.manual_seed(0)
    return Transformer(len(set(TEXT))).double()


def per_text(scores, targets):
    return cross_entropy(scores.mT, targets, reduction="none").mean(-1)


def ours(net):
    batches, validation, examples = data()
    model = mo.models.DataWeights.of(net, per_text, examples=examples)
    step = mo.inner_step(model.inner_loss, mo.optim.Adam(lr=0.01))
    w, lam = model.init()
    hg = mo.hypergradient(
        step, model.outer_loss, w, lam, batches, validation, estimator=mo.RMD(mo.trajectory.Checkpointed())
    )
    print(hg)
    worst = hg.total.argsort(descending=True)[:3]
    print("less of:", [TEXT[5 * i : 5 * i + LENGTH] for i in worst])
    return [hg.total]


def theirs(net):
    batches, (x_val, y_val), examples = data()
    weights = torch.ones(examples, dtype=torch.float64, requires_grad=True)
    w = {name: p.detach().requires_grad_() for name, p in net.named_parameters()}
    m = dict.fromkeys(w, 0.0)
    v = dict.fromkeys(w, 0.0)
    run = partial(functional_call, net)
    for t, (x, y, which) in enumerate(batches, 1):
        loss = (weights[which] * per_text(run(w, (x,)), y)).mean()
        g = dict(zip(w, torch.autograd.grad(loss, list(w.values()), create_graph=True), strict=True))
        m = {k: 0.9 * m[k] + 0.1 * g[k] for k in w}
        v = {k: 0.999 * v[k] + 0.001 * g[k] ** 2 for k in w}
        scale = {k: (v[k] / (1 - 0.999**t)).clamp_min(1e-60).sqrt() + 1e-8 for k in w}
        w = {k: w[k] - 0.01 * m[k] / (1 - 0.9**t) / scale[k] for k in w}
    return torch.autograd.grad(per_text(run(w, (x_val,)), y_val).mean(), [weights])


def compared():
    return [ours(network()), theirs(network())]


if __name__ == "__main__":
    compared()
