# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---


# %% [markdown]
# # Your loop from higher or learn2learn
#
# You have a loop that differentiates through training. It works, and one question is left: must it keep the graph of *all* steps?
#
# This page takes two such loops, one in the idiom of `higher` and one in that of learn2learn. Each changes into metaopt in a few small
# moves. After each move **the numbers are the same to 1e-9**. Then it shows what the moves bought: another estimator is one word, and
# memory no longer grows with the run.

# %%
import higher
import matplotlib.pyplot as plt
import torch
from torch.func import functional_call
from torch.nn.functional import mse_loss

import metaopt as mo

torch.manual_seed(0)
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)


def same(one, other):
    """Two trees of numbers agree to 1e-9 of their size."""
    pairs = list(zip(mo.tree.leaves(one), mo.tree.leaves(other), strict=True))
    gap = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
    print(f"largest relative difference {gap:.0e}")
    assert all(b.norm() > 0 for _, b in pairs)
    assert gap < 1e-9


# %% [markdown]
# ## 1. A loop of higher
#
# Regression with a penalty for each parameter of a network. $\lambda$ holds the logarithms, and the validation loss after $T$ steps
# judges them. The rate is low enough for 300 steps. At 0.1 the hypergradient of so long a run is more than a million times larger, and any two ways
# to compute it drift apart by their rounding.

# %%
x = torch.randn(2, 200, 10)
y = torch.randn(2, 200, 1)
train = (x[0], y[0])
validation = (x[1], y[1])
net = torch.nn.Sequential(
    torch.nn.Linear(10, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1)
)
lam = torch.full((len(list(net.parameters())),), -5.0)


def penalty(lam, parameters):
    return sum(log.exp() * p.square().sum() for log, p in zip(lam, parameters, strict=True))


def in_higher(T):
    logs = lam.clone().requires_grad_()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    with higher.innerloop_ctx(net, optimizer) as (fast, differentiable):
        for _ in range(T):
            differentiable.step(mse_loss(fast(train[0]), train[1]) + penalty(logs, fast.parameters()))
        outer = mse_loss(fast(validation[0]), validation[1])
        (gradient,) = torch.autograd.grad(outer, logs)
    return gradient


T = 20
from_higher = in_higher(T)
from_higher

# %% [markdown]
# ## 2. First move: the module becomes a function
#
# `mo.functional` takes the place of `innerloop_ctx`. What the loop body said to `fast`, a loss now says to `model(w, …)`. So the weights
# are an argument, and nothing is patched.

# %%
model = mo.functional(net)


def outer_loss(w, lam, batch):
    return mse_loss(model(w, batch[0]), batch[1])


def inner_loss(w, lam, batch):
    return mse_loss(model(w, batch[0]), batch[1]) + penalty(lam, w.values())


# %% [markdown]
# ## 3. Second move: `differentiable.step` becomes `step`
#
# `mo.inner_step` pairs a loss with an optimiser. The loop stays a loop, and plain autograd still goes through all of it. The state holds the
# weights, the momentum and the number of steps.

# %%
step = mo.inner_step(inner_loss, mo.optim.SGD(lr=0.02, momentum=0.9))

logs = lam.clone().requires_grad_()
state = step.init(model.params, logs)
for _ in range(T):
    state = step(state, logs, train)
(gradient,) = torch.autograd.grad(outer_loss(state.w, logs, validation), logs)
same(gradient, from_higher)

# %% [markdown]
# ## 4. Third move: the loop becomes a call
#
# `mo.unroll` runs all steps. For autograd it is one node, so your code around it stays as it was, with `.backward()` and all.

# %%
logs = lam.clone().requires_grad_()
w = mo.unroll(step, model.params, logs, [train] * T).w
outer_loss(w, logs, validation).backward()
same(logs.grad, from_higher)

# %% [markdown]
# And if the hypergradient is all that you want of the run, ask for it:

# %%
report = mo.hypergradient(step, outer_loss, model.params, lam, [train] * T, validation, estimator=mo.RMD())
same(report.total, from_higher)
print(report)

# %% [markdown]
# Would you rather keep the optimiser and the patched module of `higher`? Then the last two moves are enough:

# %%
with higher.innerloop_ctx(net, torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)) as (fast, differentiable):
    kept = mo.interop.from_higher(fast)

    def kept_outer(w, lam, batch):
        return mse_loss(kept(w, batch[0]), batch[1])

    def kept_inner(w, lam, batch):
        return kept_outer(w, lam, batch) + penalty(lam, mo.tree.leaves(w))

    kept_step = mo.inner_step(kept_inner, mo.interop.from_higher(differentiable))
    total = mo.hypergradient(kept_step, kept_outer, kept.params, lam, [train] * T, validation).total
same(total, from_higher)

# %% [markdown]
# ## 5. A loop of learn2learn
#
# MAML in learn2learn reads `learner = maml.clone()`, `learner.adapt(loss)`, `loss.backward()`. The package is not needed here: the two
# methods are written out below, in the way that it documents. `clone` copies the weights so that autograd sees the copy. `adapt` takes
# one gradient step, with `create_graph=True`. Here $\lambda$ is the initialisation, judged over four sine waves after five steps.


# %%
class Learner:
    """The idiom of learn2learn's MAML."""

    def __init__(self, module, lr, weights=None):
        self.module = module
        self.lr = lr
        self.weights = weights or dict(module.named_parameters())

    def clone(self):
        return Learner(self.module, self.lr, {name: w.clone() for name, w in self.weights.items()})

    def adapt(self, loss):
        gradients = torch.autograd.grad(loss, list(self.weights.values()), create_graph=True)
        self.weights = {name: w - self.lr * g for (name, w), g in zip(self.weights.items(), gradients, strict=True)}

    def __call__(self, x):
        return functional_call(self.module, self.weights, (x,))


TASKS = 4
sines = torch.nn.Sequential(torch.nn.Linear(1, 40), torch.nn.Tanh(), torch.nn.Linear(40, 1))
points = 10 * torch.rand(2, TASKS, 10, 1) - 5
amplitude = 0.1 + 4.9 * torch.rand(TASKS, 1, 1)
phase = torch.pi * torch.rand(TASKS, 1, 1)
support, query = [(part, amplitude * (part - phase).sin()) for part in points]

maml = Learner(sines, lr=0.01)
for i in range(TASKS):
    learner = maml.clone()
    for _ in range(5):
        learner.adapt(mse_loss(learner(support[0][i]), support[1][i]))
    loss = mse_loss(learner(query[0][i]), query[1][i]) / TASKS
    loss.backward()
from_learner = {name: p.grad.clone() for name, p in sines.named_parameters()}

# %% [markdown]
# The same one move at a time. `clone` goes: the weights are arguments already. `adapt` becomes a step. Its initial weights are $\lambda$, so
# they are what requires grad.

# %%
wave = mo.functional(sines)


def task_loss(w, lam, batch):
    return mse_loss(wave(w, batch[0]), batch[1])


adapt = mo.inner_step(task_loss, mo.optim.SGD(lr=0.01))
initial = {name: w.clone().requires_grad_() for name, w in wave.params.items()}
for i in range(TASKS):
    w = mo.unroll(adapt, initial, None, [(support[0][i], support[1][i])] * 5).w
    loss = task_loss(w, None, (query[0][i], query[1][i])) / TASKS
    loss.backward()
same({name: w.grad for name, w in initial.items()}, from_learner)

# %% [markdown]
# The loop over tasks can go as well. `mo.models.MAML` knows about the initialisation, and runs the four tasks as one batch.

# %%
meta = mo.models.MAML.of(sines, mse_loss)
w, phi = meta.init()
report = mo.hypergradient(meta.step(mo.optim.SGD(lr=0.01)), meta.objective(), w, phi, [support] * 5, query)
same(report.total, from_learner)

# %% [markdown]
# ## 6. What it buys: the estimator is one word
#
# The loop of section 1 could do one thing. Now each row is an argument.

# %%
problem = mo.Problem(step, outer_loss, model.params, lam, [train] * T, validation)
estimators = {
    "RMD": mo.RMD(),
    "RMD, checkpoints": mo.RMD(mo.trajectory.Checkpointed()),
    "FMD": mo.FMD(),
    "TruncatedRMD(10)": mo.TruncatedRMD(10),
    "OneStep": mo.OneStep(),
}
for name, estimator in estimators.items():
    found = problem.hypergradient(estimator)
    error = ((found.total - from_higher).norm() / from_higher.norm()).item()
    print(f"{name:17} relative error {error:7.0e}   {found.cost}")
    if name in ("RMD", "RMD, checkpoints", "FMD"):
        assert error < 1e-9
    else:
        assert error > 0.01

# %% [markdown]
# ## 7. What it buys: memory
#
# `mo.verify.memory.peak_bytes` counts the most bytes that tensors held at one time. The loop of `higher` keeps every activation of every
# step. `Full`, the default of `RMD`, keeps the states, and makes each step's graph when it comes to it. `Checkpointed` keeps a few states and
# runs again from them.

# %%
HORIZONS = [10, 30, 100, 300]
CHECKPOINTS = 10


def exact(T, trajectory):
    estimator = mo.RMD(trajectory)
    return mo.hypergradient(step, outer_loss, model.params, lam, [train] * T, validation, estimator=estimator).total


ways = {
    "loop of higher": in_higher,
    "RMD(), keeps states": lambda T: exact(T, mo.trajectory.Full()),
    f"RMD(Checkpointed({CHECKPOINTS}))": lambda T: exact(T, mo.trajectory.Checkpointed(CHECKPOINTS)),
}
answers = {}
peaks = {name: [] for name in ways}
for name, way in ways.items():
    for T in HORIZONS:
        peaks[name].append(mo.verify.memory.peak_bytes(lambda: answers.update({name: way(T)})) / 2**20)
    print(f"{name:23}" + "".join(f"{f'{mib:.1f} MiB':>12}" for mib in peaks[name]))
for answer in answers.values():
    same(answer, answers["loop of higher"])

loop, states, checkpoints = peaks.values()
assert loop[-1] > 5 * states[-1] > 20 * checkpoints[-1]
assert checkpoints[-1] < 1.5 * checkpoints[1]

# %% [markdown]
# All three give the same hypergradient, also after 300 steps. The price is work: `Full` computes each step once more, and `Checkpointed` a few
# times. [Long runs](07_long_runs.ipynb) has the times.

# %%
COLOURS = ("#888888", "#0072B2", "#D55E00")
figure, axes = plt.subplots(figsize=(8, 4.4), layout="constrained")
for (name, row), colour in zip(peaks.items(), COLOURS, strict=True):
    axes.loglog(HORIZONS, row, "o-", color=colour, lw=2)
    text = f"{name}\n{row[-1]:.1f} MiB"
    axes.annotate(text, (HORIZONS[-1], row[-1]), (10, 0), textcoords="offset points", color=colour, va="center")
axes.set(xlabel="steps of the run, T", ylabel="peak memory, MiB")
axes.set_title("The same hypergradient, three ways to remember the run")
axes.set(xlim=(9, 1300), ylim=(1, 400))
axes.set_xticks(HORIZONS, [str(T) for T in HORIZONS])
axes.minorticks_off()
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## Where to go next
#
# - [Your first hypergradient](01_first_hypergradient.ipynb) explains what the estimators drop.
# - [MAML and friends](03_maml_and_friends.ipynb) goes on from section 5.
# - [Long runs](07_long_runs.ipynb) has more ways to remember, with their times.
