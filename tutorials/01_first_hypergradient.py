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
# # Your first hypergradient
#
# A network is trained for $T$ steps, $w_t = \Phi(w_{t-1}, \lambda; D_t)$, and judged by a validation loss at its end. How does that
# loss change when a *hyperparameter* $\lambda$ changes?
#
# $$\frac{dL_{val}}{d\lambda} = \underbrace{\frac{\partial L_{val}}{\partial\lambda}}_{\text{direct}}
#   + \underbrace{\frac{\partial L_{val}}{\partial w_T}\frac{dw_T}{d\lambda}}_{\text{indirect}}$$
#
# The answer is exact if we differentiate through the whole training run, and cheaper if we do not. This page does both:
# wrap a module, differentiate a training loop with three estimators, and hold them against the exact answer.

# %%
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import metaopt as mo

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)

# %% [markdown]
# ## 1. A module becomes a function
#
# `mo.functional` clones parameters and buffers once; the module itself is never touched again.

# %%
module = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
model = mo.functional(module)
model

# %% [markdown]
# A small regression problem: 40 noisy training points in 20 dimensions (easy to overfit), 200 for validation.

# %%
truth = torch.randn(20)
x_train = torch.randn(40, 20)
x_val = torch.randn(200, 20)
y_train = (x_train @ truth + 3.0 * torch.randn(40)).unsqueeze(1)
y_val = (x_val @ truth + 3.0 * torch.randn(200)).unsqueeze(1)

# %% [markdown]
# ## 2. Losses and an update rule
#
# $\lambda$ is any pytree of tensors. Here: the logarithm of an L2 penalty for each parameter, and the logarithm of the learning rate.
# A hyperparameter of the optimiser may be a function of $(\lambda, t)$, and what it returns is differentiated like everything else.

# %%
lam = {
    "log_l2": {name: torch.tensor(-4.0) for name in model.params},
    "log_lr": torch.tensor(-2.5),
}


def inner_loss(w, lam, batch):
    x, y = batch
    penalty = sum(lam["log_l2"][name].exp() * w[name].pow(2).sum() for name in w)
    return F.mse_loss(model(w, x), y) + penalty


def outer_loss(w, lam, batch):
    x, y = batch
    return F.mse_loss(model(w, x), y)


step = mo.inner_step(inner_loss, mo.optim.SGD(lr=lambda lam, t: lam["log_lr"].exp(), momentum=0.9))

# %% [markdown]
# ## 3. The exact hypergradient
#
# One call: run the inner loop for $T = 60$ steps, differentiate the validation loss at its end.

# %%
T = 60
batches = [(x_train, y_train)] * T
exact = mo.hypergradient(step, outer_loss, model.params, lam, batches, (x_val, y_val), estimator=mo.RMD())
exact.total

# %% [markdown]
# Is it right? Move the learning rate a little and train again. That is slow, and only good for one number at a time, but it cannot lie:

# %%
def validation_loss(lam):
    state = step.init(model.params, lam)
    for batch in batches:
        state = step(state, lam, batch)
    return outer_loss(state.w, lam, (x_val, y_val)).item()


h = 1e-5
up, down = ({**lam, "log_lr": lam["log_lr"] + s} for s in (h, -h))
difference = (validation_loss(up) - validation_loss(down)) / (2 * h)
print(f"finite difference {difference:+.8f}\nRMD               {exact.total['log_lr'].item():+.8f}")
assert abs(difference - exact.total["log_lr"].item()) < 1e-5 * abs(difference)

# %% [markdown]
# ## 4. Three estimators against it
#
# The estimator is one argument. `OneStep` sees only the last step, `TruncatedRMD(20)` the last twenty, `DrMAD` sweeps along the straight
# line between first and last state. `hg.cost` counts the work.

# %%
def flat(tree):
    return torch.cat([leaf.reshape(-1) for leaf in mo.tree.leaves(tree)])


estimators = {"1-step": mo.OneStep(), "truncated, 20": mo.TruncatedRMD(20), "DrMAD": mo.DrMAD(), "RMD": mo.RMD()}
print(f"{'':14} {'cosine':>8} {'norm ratio':>11} {'products':>9}")
for name, estimator in estimators.items():
    hg = mo.hypergradient(step, outer_loss, model.params, lam, batches, (x_val, y_val), estimator=estimator)
    g = flat(hg.total)
    e = flat(exact.total)
    print(f"{name:14} {F.cosine_similarity(g, e, dim=0):8.4f} {g.norm() / e.norm():11.4f} {hg.cost.products:9d}")

# %% [markdown]
# The 1-step method has a fair direction and one or two percent of the size. DrMAD's direction is no better here, and its size is off by
# many orders of magnitude: the states on the straight line were never visited, and the product of sixty Jacobians taken there grows
# without bound. Approximations are checked, not trusted.

# %% [markdown]
# ## 5. How much does the horizon matter?
#
# Truncation interpolates between the 1-step method and the exact answer.

# %%
horizons = [1, 2, 5, 10, 20, 30, 40, 50, 60]
truncated = [
    flat(mo.hypergradient(step, outer_loss, model.params, lam, batches, (x_val, y_val), estimator=mo.TruncatedRMD(K)).total) for K in horizons
]
error = [((g - flat(exact.total)).norm() / flat(exact.total).norm()).item() for g in truncated]
assert error[-1] < 1e-10

figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
axes.plot(horizons, error, "o-")
axes.set(xlabel="steps that are differentiated (K)", ylabel="relative error to the exact hypergradient", title="Short-horizon bias")
axes.grid(alpha=0.3)
plt.show()

# %% [markdown]
# ## 6. Use it
#
# A few steps of an ordinary `torch.optim` optimiser on $\lambda$, each with the exact hypergradient of a whole training run:

# %%
outer = mo.meta.OuterOptimizer(lam, lambda params: torch.optim.Adam(params, lr=0.1))
losses = []
for _ in range(30):
    hg = mo.hypergradient(step, outer_loss, model.params, outer.lam, batches, (x_val, y_val), estimator=mo.RMD())
    outer.update(hg.total)
    losses.append(hg.outer_loss.item())
print(f"validation loss: {losses[0]:.2f} with the first guess, {losses[-1]:.2f} after 30 hyper-steps")
assert losses[-1] < losses[0]

# %% [markdown]
# Your `module`, `lam` and random state are as they were. Where to go next: move $\lambda$ *during* training with `mo.online`, or pick an
# estimator from the table in the README.
