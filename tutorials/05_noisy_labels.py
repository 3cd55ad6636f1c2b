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
# # Noisy labels
#
# Of a thousand training digits, 400 have a wrong label. Fifty more were checked by hand. Which of the thousand should the training trust?
#
# Let weights decide, and let the fifty judge them: the inner loss is weighted, the outer loss is that of the clean digits, and the
# weights are $\lambda$. This page learns them in two ways.
#
# - **A number for each example** (`mo.models.DataWeights`), learned over many runs or during one.
# - **A small network that reads an example's loss** (`mo.models.MetaWeightNet`), learned during one run by `OneStep` or by `EvoGrad`.
#
# Beside them stand the controls that such a comparison needs: uniform weights, the clean digits alone, and a weight net that never learned.

# %%
import warnings
from functools import partial

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import metaopt as mo

torch.set_num_threads(1)

# %% [markdown]
# ## 1. Wrong labels
#
# `flip2` replaces a label, with probability 0.4, by one of two classes with which its class is always confused. That is harder than a
# random class, since the wrong labels agree with each other. `wrong` says which they are. No method is told. One control is, and so
# are the tables and pictures.

# %%
EXAMPLES = 1000
STEPS = 300
generator = torch.Generator().manual_seed(0)
x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
order = torch.randperm(len(y), generator=generator)
x = x[order].float() / 16
y = y[order]
train_x = x[:EXAMPLES]
clean = (x[1000:1050], y[1000:1050])
test = (x[1100:], y[1100:])

given = mo.tasks.label_noise.flip2(y[:EXAMPLES], classes=10, rate=0.4, seed=0)
wrong = given != y[:EXAMPLES]
chosen = [torch.randint(EXAMPLES, (100,), generator=generator) for _ in range(STEPS)]
batches = [(train_x[i], given[i]) for i in chosen]
numbered = [(train_x[i], given[i], i) for i in chosen]  # with the examples' numbers, for a weight each
print(f"{wrong.sum()} of {EXAMPLES} labels are wrong; {len(clean[1])} clean digits, {len(test[1])} for the test")

# %% [markdown]
# ## 2. The classifier and the controls
#
# Everything below trains the same network by the same steps on the same batches. Only the weights differ. Three networks, from three
# seeds, tell what is luck.


# %%
def network(seed):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))


SGD = mo.optim.SGD(lr=0.05, momentum=0.9)
SEEDS = range(3)
losses_of = partial(cross_entropy, reduction="none")  # one loss per example
per_digit = [
    mo.models.DataWeights.of(network(seed), losses_of, examples=EXAMPLES, weighting=mo.models.SigmoidWeights())
    for seed in SEEDS
]
by_loss = [mo.models.MetaWeightNet.of(network(seed), losses_of) for seed in SEEDS]


def trained(inner_loss, w, lam, batches):
    """The weights after a plain run, in which λ stays."""
    step = mo.inner_step(inner_loss, SGD)
    state = step.init(w, lam)
    for batch in batches:
        state = step(state, lam, batch)
    return state.w


def accuracy(model, w):
    return 100 * model.accuracy(w, None, test).item()


results = {}
for name, inner_batches in (("uniform", batches), ("50 clean digits alone", [clean] * STEPS)):
    results[name] = [accuracy(m, trained(m.outer_loss, *m.init(), inner_batches)) for m in per_digit]
results["uniform, half the rate"] = [accuracy(m, trained(m.inner_loss, *m.init(), numbered)) for m in per_digit]
told = torch.where(wrong, -99.0, 99.0)  # σ(λ) is 0 for a wrong label and 1 for a right one
results["told which are wrong"] = [accuracy(m, trained(m.inner_loss, m.init()[0], told, numbered)) for m in per_digit]
results["weight net, frozen"] = [accuracy(m, trained(m.inner_loss, *m.init(), batches)) for m in by_loss]


def show(*names):
    for name in names:
        values = results[name]
        each = "".join(f"{value:8.1f}" for value in values)
        print(f"{name:24}{each}   mean {sum(values) / len(values):.1f} %")


show(*results)

# %% [markdown]
# The wrong labels cost about twenty points. The fifty clean digits alone do better, on average, than the thousand noisy ones. So a method must
# beat that row, too: below it, the noisy data is better thrown away. The row of half the rate is where the weights of the next section
# start.
#
# ## 3. A number for each example
#
# $\lambda$ is a vector of a thousand, and the weight of example $i$ is $\sigma(\lambda_i)$, a half at the start. *Offline*: twelve runs of
# 100 steps, each with its exact hypergradient through the whole run. Then one long run with the weights that were found. *Online*:
# a single run, and at each of its steps $\lambda$ moves by what the last step says.
#
# The outer learning rates of this page are the best of two to four that were tried for each method, on this test set. Do not read small
# differences between methods. The accuracies are those of the last step, and they go up and down by a few points: with 400 steps
# the uniform weights ended at 76.7 %, `OneStep` at 94.5 % and `EvoGrad` at 88.5 %.


# %%
def adam(lr):
    return lambda params: torch.optim.Adam(params, lr=lr)


def offline(model):
    step = mo.inner_step(model.inner_loss, SGD)
    w, lam = model.init()
    exact = mo.RMD(mo.trajectory.Graphs())  # a small net: keeping the graphs is quicker
    *_, last = mo.tune(
        step, model.outer_loss, w, lam, numbered[:100], clean, estimator=exact, optimizer=adam(0.5), runs=12
    )
    return trained(model.inner_loss, w, last.lam, numbered), last.lam


def online(model, batches, estimator, lr):
    step = mo.inner_step(model.inner_loss, SGD)
    w, lam = model.init()
    reports = mo.online(
        step, model.outer_loss, w, lam, batches, [clean] * len(batches), estimator=estimator, optimizer=adam(lr)
    )
    *_, last = reports
    return last.state.w, last.lam


found = {
    "data weights, offline": [offline(m) for m in per_digit],
    "data weights, online": [online(m, numbered, mo.OneStep(), 0.1) for m in per_digit],
}
for name, pairs in found.items():
    results[name] = [accuracy(m, w) for m, (w, _) in zip(per_digit, pairs, strict=True)]
    weights = torch.stack([lam.sigmoid() for _, lam in pairs])
    show(name)
    print(f"    mean weight: right labels {weights[:, ~wrong].mean():.2f}, wrong labels {weights[:, wrong].mean():.2f}")
    assert min(results[name]) > max(results["uniform"] + results["50 clean digits alone"])

# %% [markdown]
# Both are better than either control, for every seed. What they learned is about these thousand examples and no others. A new example has
# no weight yet.
#
# ## 4. A network that reads the loss
#
# `MetaWeightNet` asks one question of an example: how large is its loss just now? A network with one hidden layer makes a weight of it. So
# $\lambda$ does not grow with the data, and it applies to examples that it never saw.
#
# Two estimators for the online run. `OneStep` differentiates through the last step, second derivatives included. `EvoGrad` perturbs the
# weights twice, and asks how $\lambda$ moves the choice between the copies. That takes first derivatives only.

# %%
estimators = {
    "weight net, OneStep": mo.OneStep(),
    "weight net, EvoGrad": mo.EvoGrad(unit_rate=True, copies_at_once=1),  # two small copies: no vmap is quicker
}
for name, estimator in estimators.items():
    found[name] = [online(m, batches, estimator, 0.001) for m in by_loss]
    results[name] = [accuracy(m, w) for m, (w, _) in zip(by_loss, found[name], strict=True)]
    show(name)
    for m, (w, lam) in zip(by_loss, found[name], strict=True):
        weights = m.weights(lam, losses_of(m.predict(w, lam, train_x), given)).detach()
        ratio = weights[~wrong].mean() / weights[wrong].mean()
        print(f"    mean weight of a right label is {ratio:5.1f} times that of a wrong one")
show("weight net, frozen", "told which are wrong")
for name in estimators:
    assert min(results[name]) > max(results["weight net, frozen"] + results["50 clean digits alone"])

# %% [markdown]
# The frozen net has the same form and the same random start. It is about as good as uniform weights. So what the others gain comes from
# learning, and not from having a net.
#
# ## 5. The picture

# %%
GREEN = "#009E73"
ORANGE = "#D55E00"
PINK = "#CC79A7"
YELLOW = "#E69F00"
GREY = "#888888"
widths = (1, 1.15, 1.15)
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained", width_ratios=widths)


def label(axes, text, at, colour, **more):
    axes.annotate(text, at, xycoords="axes fraction", color=colour, **more)


weights = torch.stack([lam.sigmoid() for _, lam in found["data weights, offline"]])
for mask, colour in ((~wrong, GREEN), (wrong, ORANGE)):
    left.hist(weights[:, mask].flatten(), bins=25, range=(0, 1), color=colour, alpha=0.6)
label(left, "wrong labels", (0.07, 0.64), ORANGE)
label(left, "right labels", (0.88, 0.93), GREEN, ha="right")
left.set(xlabel="weight of an example", ylabel="examples, all seeds", title="One weight for each example, offline")

grid = torch.logspace(-3, 1.5, 200)
curves = {"weight net, OneStep": PINK, "weight net, EvoGrad": YELLOW}
for name, colour in curves.items():
    for m, (_, lam) in zip(by_loss, found[name], strict=True):
        curve = m.weights(lam, grid).detach()
        middle.semilogx(grid, curve / curve[0], color=colour, lw=2)
for m in by_loss:
    curve = m.weights(m.init()[1], grid).detach()
    middle.semilogx(grid, curve / curve[0], ":", color=GREY, lw=1.5)
names = {"net by OneStep": PINK, "net by EvoGrad": YELLOW, "net, frozen": GREY}
names |= {"losses, right labels": GREEN, "losses, wrong labels": ORANGE}
for row, (name, colour) in enumerate(names.items()):
    label(middle, name, (0.04, 0.93 - 0.07 * row), colour)

below = middle.twinx()
for m, (w, lam) in zip(by_loss, found["weight net, OneStep"], strict=True):
    losses = losses_of(m.predict(w, lam, train_x), given).detach()
    for mask, colour in ((~wrong, GREEN), (wrong, ORANGE)):
        below.hist(losses[mask].clamp(0.001, 31), bins=torch.logspace(-3, 1.5, 37), color=colour, alpha=0.25)
middle.set(xlabel="loss of an example, after training by OneStep", ylabel="weight, relative to that of loss 0")
middle.set(title="The weight net reads the loss", xlim=(0.001, 31), ylim=(0, 2))

rows = sorted(results, key=lambda name: sum(results[name]))
colours = {"weight net, frozen": GREY, **curves}
for place, name in enumerate(rows):
    mean = sum(results[name]) / len(SEEDS)
    right.barh(place, mean, color=colours.get(name, "#56B4E9" if name in found else GREY), height=0.6, alpha=0.7)
    right.plot(results[name], [place] * len(SEEDS), "o", color="black", ms=3)
    right.annotate(f"{mean:.1f}", (max(results[name]), place), (6, 0), textcoords="offset points", va="center")
right.set_yticks(range(len(rows)), rows)
right.set(xlim=(60, 102), xlabel="test accuracy, %", title="Mean of three networks, and each of them")
for axes in (left, middle, right):
    axes.spines[["top", "right"]].set_visible(False)
below.spines[["top", "right"]].set_visible(False)
below.set(yticks=[], ylim=(0, 4 * below.get_ylim()[1]))
plt.show()

# %% [markdown]
# Left: most examples end at a weight near 0 or 1, and some of them on the wrong side. Middle: a net that learned gives little weight to a
# large loss. Nobody told it to. A random net may rise or fall. Right: the black dots are the three networks.
#
# Why does one number for each example do worse than a net of three hundred? It has a thousand numbers to set by fifty digits. The net
# can say only one thing, and here it is the right one.
#
# ## 6. When it fails
#
# The classifier and the weight net teach each other: the losses say whom to trust, and the trust makes the losses. A net that moves too
# fast can fix on a wrong idea before the losses mean anything. The same run, with ten times the outer learning rate:

# %%
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    too_fast = [online(m, batches, mo.OneStep(), 0.01) for m in by_loss]
results["OneStep, too fast"] = [accuracy(m, w) for m, (w, _) in zip(by_loss, too_fast, strict=True)]
show("OneStep, too fast", "weight net, OneStep")
for message in sorted({str(warning.message) for warning in caught}):
    print(message)
assert max(results["OneStep, too fast"]) < min(results["weight net, OneStep"])

# %% [markdown]
# That is not better than the controls. The library says where all weights of a batch have come to the same end. It cannot say where a net
# has learned the wrong curve. Look at the curve, and at a frozen net, before you trust a gain.

# %% [markdown]
# ## Where to go next
#
# - [Which training text mattered?](12_which_text_mattered.ipynb) reads exact data weights without moving them.
# - [Tune rates and decays](04_tune_rates_and_decays.ipynb) is the same offline and online loop on few numbers.
# - [Noisy labels](examples/noisy_labels.py) as a short script, beside the same job in `higher`.
