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
# # Long runs
#
# Exact reverse mode goes back through every step, so it needs every state. In a long run these states do not fit. Five ways to have them all the
# same differ in what they keep and in what they compute again. **They give the same hypergradient.** This page measures what each costs.

# %%
import tempfile
import time

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import metaopt as mo

torch.manual_seed(0)
torch.set_num_threads(1)

# %% [markdown]
# ## 1. A run that can be as long as you like
#
# Logistic regression on digits, with momentum. $\lambda$ holds the learning rate and a weight decay for each input pixel.

# %%
x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
x = x.float() / 16
train = (x[:300], y[:300])
validation = (x[300:800], y[300:800])
model = mo.functional(torch.nn.Linear(64, 10))


def inner_loss(w, lam, batch):
    decay = (lam["log_decay"].exp() * w["weight"].square()).sum()
    return cross_entropy(model(w, batch[0]), batch[1]) + decay


def outer_loss(w, lam, batch):
    return cross_entropy(model(w, batch[0]), batch[1])


lam = {"log_lr": torch.tensor(-2.0), "log_decay": torch.full((64,), -6.0)}
step = mo.inner_step(inner_loss, mo.optim.SGD(lr=mo.by("log_lr", torch.exp), momentum=0.9))


def problem(T):
    return mo.Problem(step, outer_loss, model.params, lam, [train] * T, validation)


state_bytes = 2 * sum(w.numel() * w.element_size() for w in model.params.values())
print(f"a state, weights and momentum, takes {state_bytes:,} bytes; a thousand of them {1000 * state_bytes / 2**20:.1f} MiB")

# %% [markdown]
# ## 2. The ways
#
# | | keeps | computes again |
# |---|---|---|
# | `Graphs` | every graph | nothing |
# | `Full` (default) | every state | each step once |
# | `Checkpointed(17)` | 17 states | the steps between them, by the binomial schedule that is optimal |
# | `Budgeted(bytes)` | graphs of the last steps, then states, then checkpoints | what the bytes do not hold |
# | `Offloaded(directory=…)` | states in a file | each step once |
#
# There is also `Reversible`. It runs momentum SGD backwards, to the bit, for a rate that is a plain number.

# %%
folder = tempfile.TemporaryDirectory()
WAYS = {
    "Graphs": mo.trajectory.Graphs(),
    "Full": mo.trajectory.Full(),
    "Checkpointed(17)": mo.trajectory.Checkpointed(17),
    "Budgeted(1 MiB)": mo.trajectory.Budgeted(2**20),
    "Offloaded": mo.trajectory.Offloaded(directory=folder.name),
}


def run(T, way):
    return problem(T).hypergradient(mo.RMD(WAYS[way]))


def gradients(cost):
    """How many gradients of the inner loss were taken."""
    return cost.steps + cost.linearizations


exact = run(100, "Graphs")
print(f"{'T = 100':18} {'gradients':>9} {'largest difference':>20}")
for way in WAYS:
    found = run(100, way)
    pairs = zip(mo.tree.leaves(found.total), mo.tree.leaves(exact.total), strict=True)
    gap = max((a - b).abs().max().item() for a, b in pairs)
    print(f"{way:18} {gradients(found.cost):9d} {gap:20.0e}")
    assert gap < 1e-6

# %% [markdown]
# ## 3. Memory and time against the length of the run
#
# `mo.verify.memory.peak_bytes` counts the most bytes that tensors held at one time. It counts a mapped file, too, so `Offloaded` is left out here:
# its states are those of `Full`, and its memory is the operating system's to give back. On the disk of this machine it takes its time.

# %%
HORIZONS = [10, 30, 100, 300]
peaks = {way: [mo.verify.memory.peak_bytes(lambda: run(T, way)) / 2**20 for T in HORIZONS] for way in WAYS if way != "Offloaded"}


def seconds(T, way):
    start = time.perf_counter()
    run(T, way)
    return time.perf_counter() - start


times = {way: sorted(seconds(100, way) for _ in range(3))[1] for way in WAYS}
print(f"{'':18}" + "".join(f"{f'T = {T}':>10}" for T in HORIZONS) + "   time at T = 100, Full = 1")
for way in WAYS:
    row = "".join(f"{mib:7.2f}MiB" for mib in peaks[way]) if way in peaks else f"{'in a file':>40}"
    print(f"{way:18}{row}{times[way] / times['Full']:20.2f}")
assert peaks["Checkpointed(17)"][-1] < 0.5 * peaks["Full"][-1] < 0.1 * peaks["Graphs"][-1]

# %% [markdown]
# The graphs grow with the run, and so do the states, more slowly. Checkpoints and a budget do not. The budget counts what autograd saves for a
# graph. What else a graph keeps alive comes on top, which is much in a model as small as this one.
#
# ## 4. Two thousand steps in the memory of seventeen states

# %%
T = 2000
report = run(T, "Checkpointed(17)")
print(report)
print(f"states kept: 17 of {T}; each step was computed {gradients(report.cost) / T:.2f} times")

# %% [markdown]
# ## 5. The picture

# %%
COLOURS = dict(zip(WAYS, ("#888888", "#0072B2", "#D55E00", "#009E73", "#CC79A7"), strict=True))
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
for way, row in peaks.items():
    left.loglog(HORIZONS, row, "o-", color=COLOURS[way])
place = 0.0
for way in sorted(peaks, key=lambda way: peaks[way][-1]):
    place = max(peaks[way][-1], 1.35 * place)
    left.annotate(way, (HORIZONS[-1], place), (9, 0), textcoords="offset points", color=COLOURS[way], va="center")
left.set(xlabel="steps of the run, T", ylabel="peak memory, MiB", title="What a run holds in memory", xlim=(8, 1500))
left.set_xticks(HORIZONS, [str(T) for T in HORIZONS])
left.minorticks_off()
names = list(WAYS)
right.barh(names, [times[way] / times["Full"] for way in names], color=[COLOURS[way] for way in names], height=0.6)
right.axvline(1, color="#bbbbbb", lw=1)
right.invert_yaxis()
right.set(xlabel="time at T = 100, relative to Full", title="What it costs in time")
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
plt.show()
folder.cleanup()

# %% [markdown]
# ## 6. Small nets: fewer, larger calls
#
# A step of a small net is made of many small operations, each of which costs a call from Python. `mo.compiled(step, steps_at_once=20)` compiles
# twenty steps as one. Compiling takes a minute or more, once, so this page leaves it out. The benchmarks have the figures.

# %% [markdown]
# ## Where to go next
#
# - [Your first hypergradient](01_first_hypergradient.ipynb) starts with the default trajectory.
# - [Which training text mattered?](12_which_text_mattered.ipynb) uses checkpoints under Adam.
# - `mo.diagnose.preflight(problem)` forecasts bytes and seconds of each trajectory for your own problem, from two steps.
