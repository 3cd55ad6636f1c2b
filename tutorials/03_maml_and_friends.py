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
# # MAML, Meta-SGD, ANIL and Reptile
#
# A new task comes with ten examples. A network that starts from random weights cannot learn much from ten. Meta-learning asks for weights
# from which it can: the *inner* loop fits one task, the *outer* loop moves the start so that the fit goes well on average.
#
# The four methods differ in what the outer loop moves, and in how it sees the inner loop.
#
# | method | the outer loop learns | by |
# |---|---|---|
# | MAML | the initial weights | the exact derivative through the inner steps |
# | Meta-SGD | the initial weights, and a learning rate for each of them | the same |
# | ANIL | all initial weights, but only the last layer adapts | the same |
# | Reptile | the initial weights | no derivative: it steps towards where the inner loop ended |

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn.functional import mse_loss

import metaopt as mo

torch.manual_seed(0)

# %% [markdown]
# ## 1. The tasks
#
# Each task is a sine wave with its own amplitude and phase. Ten points are for the inner loop (support), ten others judge it (query). A meta-batch
# is a stack of tasks: the first axis of every tensor counts them.

# %%
STEPS = 5
TASKS = 8
distribution = mo.tasks.Sinusoid(shots=10)


def sample(run):
    """The inner batches, the same points five times, and the query batch."""
    tasks = distribution.sample(TASKS, seed=run)
    return [tasks.train] * STEPS, tasks.test


for name, part in (("support", sample(0)[0][0]), ("query", sample(0)[1])):
    print(f"{name:8} x {tuple(part.x.shape)}, y {tuple(part.y.shape)}")

# %% [markdown]
# ## 2. Three methods, one loop
#
# A meta-model says which parameters are adapted ($w$) and which are learned by the outer loop ($\lambda$). `step` and `objective` already stand
# for a whole meta-batch. The rest is the loop of [tuning](04_tune_rates_and_decays.ipynb).


# %%
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))


def adam(params):
    return torch.optim.Adam(params, lr=3e-3)


RUNS = 500
RATE = 0.02
sgd = mo.optim.SGD(lr=RATE)
maml = mo.models.MAML.of(network(), mse_loss)
meta_sgd = mo.models.MetaSGD.of(network(), mse_loss, rate=RATE)
anil = mo.models.MAML.of(network(), mse_loss, weights=["4.*"])
methods = {"MAML": (maml, sgd), "Meta-SGD": (meta_sgd, meta_sgd.optimizer), "ANIL": (anil, sgd)}

learned = {}
losses = {}
for name, (model, optimizer) in methods.items():
    step = model.step(optimizer)
    w, lam = model.init()
    reports = list(mo.tune(step, model.objective(), w, lam, tasks=sample, optimizer=adam, runs=RUNS))
    learned[name] = (step, w, reports[-1].lam)
    losses[name] = torch.stack([report.outer_loss for report in reports])
    print(f"{name:9} query loss of the first 50 runs {losses[name][:50].mean():.2f}, of the last 50 {losses[name][-50:].mean():.2f}")

# %% [markdown]
# ## 3. Reptile needs no derivative
#
# It runs the inner loop and moves the start towards the mean of where the tasks ended. More inner steps suit it, since it learns from the
# distance.

# %%
reptile = mo.meta.Reptile(rate=0.5)
plain = mo.functional(network())


def fit(w, _, batch):
    return mse_loss(plain(w, batch.x), batch.y)


fit_step = mo.inner_step(mo.vmapped(fit), sgd)
phi = plain.params
for run in range(1, RUNS + 1):
    batches, _ = sample(run)
    with torch.no_grad():
        state = fit_step.init(mo.replicated(phi, TASKS), None)
        for batch in batches * 2:
            state = fit_step(state, None, batch)
    phi = reptile.update(phi, state.w, None)
learned["Reptile"] = (fit_step, phi, None)
learned["no meta-learning"] = (fit_step, plain.params, None)

# %% [markdown]
# ## 4. On new tasks
#
# 200 waves that no method has seen. The error on the query points is taken before and after each inner step, for twice as many steps as were
# trained for.

# %%
new = distribution.sample(200, seed=10**6)
MORE = 2 * STEPS


def errors(name):
    """The mean query error after 0, 1, …, 10 inner steps."""
    step, w, lam = learned[name]
    loss = methods[name][0].outer_loss if name in methods else fit
    metric = mo.vmapped(loss)
    with torch.no_grad():
        state = step.init(mo.replicated(w, 200), lam)
        found = [metric.each(state.w, lam, new.test)]
        for _ in range(MORE):
            state = step(state, lam, new.train)
            found.append(metric.each(state.w, lam, new.test))
    return torch.stack(found)


curves = {name: errors(name) for name in learned}
print(f"{'':17} {'0 steps':>8} {'1 step':>8} {'5 steps':>8} {'10 steps':>8}   (query error, ± 95 % interval at 5 steps)")
for name, curve in curves.items():
    mean = curve.mean(1)
    half = 1.96 * curve[STEPS].std() / 200**0.5
    print(f"{name:17} {mean[0]:8.2f} {mean[1]:8.2f} {mean[5]:8.2f} {mean[10]:8.2f}   ± {half:.2f}")
for name in ("MAML", "Meta-SGD", "ANIL", "Reptile"):
    assert curves[name][STEPS].mean() < curves["no meta-learning"][STEPS].mean()

# %% [markdown]
# MAML and ANIL are level after the five steps that they were trained for. Meta-SGD has twice as many numbers to learn and is behind after these 500
# runs. Reptile is cheaper for each run, and less exact. Before the first step none of them fits, with errors above 3: a good start is one
# that adapts.
#
# `mo.evaluate` gives the error of each new task in one call.

# %%
step, w, lam = learned["MAML"]
print("MAML after 5 steps:", mo.evaluate(step, maml.outer_loss, w, lam, [new.train] * STEPS, new.test).mean())

# %% [markdown]
# ## 5. The picture
#
# On the right, one new wave: what MAML's network says before and after it has seen the ten points.

# %%
COLOURS = dict(zip(curves, ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#888888"), strict=True))
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
ends = sorted(curves, key=lambda name: curves[name][-1].mean())
place = 0.0
for name in ends:
    mean = curves[name].mean(1)
    left.plot(range(MORE + 1), mean, "o-", ms=3.5, color=COLOURS[name])
    place = max(mean[-1].item(), place + 0.32)
    left.annotate(name, (MORE, place), (8, 0), textcoords="offset points", color=COLOURS[name], va="center")
left.axvline(STEPS, color="#dddddd", lw=1, zorder=0)
left.annotate("trained for", (STEPS, 4.2), (4, 0), textcoords="offset points", color="#888888", fontsize=9)
left.set(xlabel="inner steps on ten points", ylabel="query error on 200 new tasks", xlim=(0, MORE + 4), ylim=(0, None))
left.set_title("Adapting to a new task")
left.set_xticks(range(0, MORE + 1, 2))

grid = torch.linspace(-5, 5, 200)[:, None]
one = 3
x = new.train.x[one]
y = new.train.y[one]
single = mo.inner_step(fit, sgd)
with torch.no_grad():
    before = single.init(lam, None)
    after = before
    for _ in range(STEPS):
        after = single(after, None, mo.tasks.sinusoid.SinusoidBatch(x, y))
    right.plot(grid, plain(before.w, grid), "--", color=COLOURS["MAML"], alpha=0.5)
    right.plot(grid, plain(after.w, grid), color=COLOURS["MAML"])
order = torch.cat([x, new.test.x[one]]).flatten().argsort()
truth = torch.cat([y, new.test.y[one]]).flatten()
right.plot(torch.cat([x, new.test.x[one]]).flatten()[order], truth[order], "x", color="#444444", ms=5)
right.plot(x, y, "o", color="#D55E00", ms=6)
for state, text, shift in ((before, "before", (6, 10)), (after, "after 5 steps", (6, -12))):
    right.annotate(text, (5, plain(state.w, grid)[-1].item()), shift, textcoords="offset points", color=COLOURS["MAML"])
right.set(title="One new wave: ten points to learn from (dots), others (crosses)", xlabel="x", ylabel="y", xlim=(-5.3, 7.2))
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## Where to go next
#
# - [MAML](examples/maml.py), [Meta-SGD](examples/meta_sgd.py), [ANIL](examples/anil.py) and [implicit MAML](examples/implicit_maml.py) as short
#   scripts, each beside the same job in `higher` or as a plain loop.
# - [Implicit differentiation](08_implicit_differentiation.ipynb): what implicit MAML is made of.
# - `mo.models.WarpGrad` learns how to descend instead of where to start.
