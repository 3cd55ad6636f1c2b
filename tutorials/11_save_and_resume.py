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
# # Save, resume, several processes
#
# A long run gets killed: the queue is full, the power fails, the machine is wanted elsewhere. With `checkpoint=PATH` the same script goes on
# where it stopped, and ends with the same numbers to the bit. This page kills two runs for good and checks that.
#
# The last part splits the tasks of a meta-batch over two processes, and asks for which estimators their sum is the hypergradient of all tasks.

# %%
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

import metaopt as mo

os.environ["OMP_NUM_THREADS"] = "1"  # another number of threads may round otherwise
torch.set_num_threads(1)
folder = tempfile.TemporaryDirectory()
here = Path(folder.name)


def as_module(path):
    """A script's functions, in this process."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# %% [markdown]
# ## 1. A script that can be killed
#
# A digit classifier with a weight decay and a rate, both tuned. Batches are drawn from torch's global generator, whose state is kept in the
# file as well. `checkpoint=` is the only line that makes the loop safe.
#
# The history has a file beside it, which is written whole, too. After a resume, rows that will come again are dropped. After each report the
# script waits for a line on its input, so that it cannot run away from the signal below.

# %%
x, y = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
torch.save((x / 16, y), here / "digits.pt")
SCRIPT = here / "train.py"
SCRIPT.write_text('''
import sys
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

import metaopt as mo

torch.set_default_dtype(torch.float64)
x, y = torch.load(Path(__file__).with_name("digits.pt"))
torch.manual_seed(0)
model = mo.functional(torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10)))
positive = mo.optim.positive
lam = {name: positive.inverse(torch.tensor(value)) for name, value in (("rate", 0.02), ("decay", 0.03))}
validation = x[1000:], y[1000:]


def loss(w, lam, batch):
    return cross_entropy(model(w, batch[0]), batch[1])


step = mo.inner_step(loss, mo.optim.SGD(lr=mo.by("rate", positive), momentum=0.9, weight_decay=mo.by("decay", positive)))


def batch(t):
    rows = torch.randint(1000, (50,))
    return x[rows], y[rows]


def adam(params, lr=0.05):
    return torch.optim.Adam(params, lr=lr)


def offline(path=None, optimizer=adam):
    """24 runs of 20 steps, exact hypergradients, a file after every run."""
    torch.manual_seed(1)
    arguments = step, loss, model.params, lam, batch, validation
    return mo.tune(*arguments, optimizer=optimizer, runs=24, horizon=20, checkpoint=path)


def online(path=None):
    """One run of 300 steps, a file after every 50."""
    torch.manual_seed(1)
    arguments = step, loss, model.params, lam, batch, lambda t: validation
    options = dict(estimator=mo.OneStep(), optimizer=adam, horizon=300)
    return mo.online(*arguments, **options, checkpoint=path, checkpoint_every=50)


def follow(reports, file):
    """Keep a history in a file, print each number, and wait for a line (or for the end of the input)."""
    old = mo.History.load(file).rows if file.exists() else []
    history = None
    for report in reports:
        if history is None:
            history = mo.History([row for row in old if row["number"] < report.number])
        history.add(report)
        history.save(file)
        print(report.number, flush=True)
        sys.stdin.readline()
    return report


def main(kind):
    torch.set_num_threads(1)
    last = follow({"offline": offline, "online": online}[kind](f"{kind}.ckpt"), Path(f"{kind}.json"))
    torch.save({"lam": last.lam, "w": last.state.w}, f"{kind}.pt")
''')
train = as_module(SCRIPT)

# %% [markdown]
# ## 2. What should come out
#
# Both loops, here and now, without a file and without an interruption.


# %%
def followed(reports):
    history = mo.History()
    for report in reports:
        history.add(report)
    return history, report


whole = {"offline": followed(train.offline()), "online": followed(train.online())}
for kind, (history, report) in whole.items():
    losses = history["outer loss"]
    rate, decay = (train.positive(report.lam[name]).item() for name in ("rate", "decay"))
    print(f"{kind:7} {len(history):3d} reports, loss {losses[0]:.3f} to {losses[-1]:.3f}, rate {rate:.3f}, decay {decay:.5f}")

# %% [markdown]
# ## 3. Kill it
#
# `SIGKILL` cannot be caught: the process has no chance to tidy up. It comes while the loop is at work, as soon as a certain number is printed.


# %%
def start(kind):
    command = [sys.executable, "-c", f"import train; train.main({kind!r})"]
    return subprocess.Popen(command, cwd=here, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def kill_after(kind, number):
    process = start(kind)
    for line in process.stdout:
        if int(line) == number:
            os.kill(process.pid, signal.SIGKILL)
            break
        process.stdin.write("\n")
        process.stdin.flush()
    process.stdin.close()
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    return number


killed = {"offline": kill_after("offline", 9), "online": kill_after("online", 130)}
print(*sorted(path.name for path in here.glob("o*")))

# %% [markdown]
# The checkpoint holds plain data and tensors. `weights_only=True` means that reading it runs no code.

# %%
for kind in killed:
    content = torch.load(here / f"{kind}.ckpt", weights_only=True)
    print(f"{kind}, format {content['version']}, {(here / f'{kind}.ckpt').stat().st_size / 1000:.0f} kB")
    print("  to go on from: ", *[name for name, _ in content["content"]["items"]])
    print("  must be as now:", *content["settings"])

# %% [markdown]
# `tune` keeps the start of its runs (`phi`) and where the loop is. `online` keeps the weights with their momentum (`state`) and what the estimator
# remembers (`carry`). Both keep $\lambda$ with the outer optimiser (`outer`), and torch's random state (`rng`).
#
# ## 4. The same command again

# %%
again = {}
for kind in killed:
    output, _ = start(kind).communicate()
    again[kind] = [int(line) for line in output.split()]
    print(f"{kind}: killed at {killed[kind]}, went on with {again[kind][0]}, ended with {again[kind][-1]}")

# %% [markdown]
# The offline loop goes on with the next run. The online one repeats the steps since its last file. Now the comparison, to the bit: $\lambda$,
# the trained weights, and every loss of the two histories.


# %%
def equal(kind):
    history, report = whole[kind]
    saved = torch.load(here / f"{kind}.pt", weights_only=True)
    pairs = zip(mo.tree.leaves(saved), mo.tree.leaves({"lam": report.lam, "w": report.state.w}), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    right = dict(zip(history["number"], history["outer loss"], strict=True))
    found = mo.History.load(here / f"{kind}.json")
    assert all(right[row["number"]] == row["outer loss"] for row in found.rows)
    return found


found = {kind: equal(kind) for kind in killed}
for kind, history in found.items():
    print(f"{kind}: {len(history)} rows, the same to the bit as without the kill")
    assert len(history) >= len(whole[kind][0]) - 1

# %% [markdown]
# A checkpoint is written just before its report is given out. A kill between the two costs the history one row, and nothing else: hence the
# last line.
#
# Another learning rate of the outer optimiser is another run. The file is refused, and the message says why:

# %%
try:
    next(train.offline(here / "offline.ckpt", lambda params: train.adam(params, lr=0.01)))
except ValueError as error:
    message = str(error).replace(str(here / "offline.ckpt"), "offline.ckpt")
print(message)

# %% [markdown]
# ## 5. The picture
#
# Both histories from their files.

# %%
BLUE = "#0072B2"
ORANGE = "#D55E00"
GREY = "#888888"
figure, both = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
for axes, kind, unit, corner in zip(both, killed, ("run", "step"), ((0.06, 0.06), (0.64, 0.84)), strict=True):
    straight = whole[kind][0]
    history = found[kind]
    first_again = again[kind][0]
    axes.plot(straight["number"], straight["outer loss"], color=BLUE, lw=6, alpha=0.3, solid_capstyle="round")
    rows = {"before": [], "after": []}
    for row in history.rows:
        rows["before" if row["number"] < first_again else "after"].append((row["number"], row["outer loss"]))
    axes.plot(*zip(*rows["before"], strict=True), color=ORANGE, lw=1.5)
    axes.plot(*zip(*rows["after"], strict=True), "--", color=ORANGE, lw=1.5)
    at = killed[kind]
    height = straight["outer loss"][at - 1]
    middle = sum(axes.get_ylim()) / 2
    axes.axvspan(first_again - 1, at, color=GREY, alpha=0.25, lw=0)
    axes.plot([at], [height], "X", color="black", ms=10)
    axes.text(*corner, "without a kill", transform=axes.transAxes, color=BLUE)
    axes.text(corner[0], corner[1] + 0.08, "killed and resumed", transform=axes.transAxes, color=ORANGE)
    line = {"arrowstyle": "-", "color": GREY}
    axes.annotate(f"killed after {unit} {at}", (at, height), (at, middle), ha="center", arrowprops=line)
    axes.set(title=f"mo.{'tune' if kind == 'offline' else 'online'}", xlabel=unit, ylabel="validation loss")
    axes.spines[["top", "right"]].set_visible(False)
figure.suptitle("The resumed run lies on the one that nobody killed", fontweight="bold")
plt.show()

# %% [markdown]
# The grey band is what the online run did twice: the steps between its last file and the kill.
#
# ## 6. Tasks over several processes
#
# Tasks of a meta-batch do not see each other, and the loss of the batch is the sum over them. So a process may take some of the tasks, and the
# hypergradients of all processes are added (`all_reduce`). That is right where the estimator is *linear* over the tasks. The script asks
# eleven of them, and then takes five outer steps with the first.

# %%
RANKS = here / "ranks.py"
RANKS.write_text('''
import torch
import torch.distributed as dist

import metaopt as mo

torch.set_default_dtype(torch.float64)
TASKS, STEPS = 8, 10
ESTIMATORS = {
    "RMD": mo.RMD(),
    "TruncatedRMD(3)": mo.TruncatedRMD(3),
    "OneStep": mo.OneStep(),
    "FirstOrder": mo.FirstOrder(),
    "DrMAD": mo.DrMAD(),
    "HyperDistill, θ given": mo.HyperDistill(gamma=0.9, theta=0.7),
    "IFT, Neumann(5)": mo.IFT(mo.linsolve.Neumann(5), converged=None, solved=None),
    "IFT, GMRES(3)": mo.IFT(mo.linsolve.GMRES(3), converged=None, solved=None),
    "EvoGrad": mo.EvoGrad(),
    "UORO": mo.UORO(),
    "BOME": mo.BOME(rate=0.01),
}
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(1, 20), torch.nn.Tanh(), torch.nn.Linear(20, 1))
model = mo.models.MAML.of(net, torch.nn.functional.mse_loss)
step = mo.inner_step(mo.vmapped(model.inner_loss), mo.optim.SGD(lr=0.02, momentum=0.5))
outer_loss = mo.vmapped(model.outer_loss)  # the sum over tasks
w, start = model.init()


def hypergradient(estimator, lam, run, mine):
    """That of the tasks ``mine``; the same tasks are drawn everywhere."""
    tasks = mo.tasks.Sinusoid(shots=10).sample(TASKS, seed=run)
    train, test = (mo.tree.map(lambda part: part[mine], points) for points in tasks)
    weights = mo.replicated(w, len(train.x))
    found = mo.hypergradient(step, outer_loss, weights, lam, [train] * STEPS, test, estimator=estimator)
    return mo.tree.map(torch.clone, found.total)


def results(mine=slice(None), add=lambda tree: None):
    """A hypergradient of each estimator, and λ after five outer steps."""
    found = {}
    for name, estimator in ESTIMATORS.items():
        found[name] = hypergradient(estimator, start, 0, mine)
        add(found[name])
    outer = mo.meta.OuterOptimizer(start, lambda params: torch.optim.Adam(params, lr=0.01))
    for run in range(1, 6):
        total = hypergradient(mo.RMD(), outer.lam, run, mine)
        add(total)
        outer.update(total)
    return found, outer.lam


if __name__ == "__main__":
    dist.init_process_group("gloo")

    def add(tree):
        for leaf in mo.tree.leaves(tree):
            dist.all_reduce(leaf)

    torch.save(results(slice(dist.get_rank(), None, dist.get_world_size()), add), f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()
''')
torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", RANKS.name]
done = subprocess.run(torchrun, cwd=here, capture_output=True, text=True)
assert done.returncode == 0, done.stderr
alone, alone_lam = as_module(RANKS).results()
(two, two_lam), (_, other_lam) = (torch.load(here / f"rank{rank}.pt") for rank in range(2))


# %%
def flat(tree):
    return torch.cat([leaf.reshape(-1) for leaf in mo.tree.leaves(tree)])


def difference(a, b):
    return ((flat(a) - flat(b)).norm() / flat(b).norm()).item()


ADDS = list(alone)[:7]
print("relative difference of two processes, added up, to one process")
for name in alone:
    print(f"    {name:22} {difference(two[name], alone[name]):8.1e}")
    assert (difference(two[name], alone[name]) < 1e-12) == (name in ADDS)
print(f"    λ after 5 outer steps  {difference(two_lam, alone_lam):8.1e}")
assert difference(two_lam, alone_lam) < 1e-12
assert all(torch.equal(a, b) for a, b in zip(mo.tree.leaves(two_lam), mo.tree.leaves(other_lam), strict=True))

# %% [markdown]
# The first seven are sums over tasks, and they add up. Both processes make the same step, so that $\lambda$ stays the same on both to the bit.
# The other four see all tasks through one number, and two processes have two such numbers:
#
# - GMRES chooses its step lengths for the whole system at once. If it were solved, the sum would be right; three steps are far from that.
# - EvoGrad's softmax compares losses summed over tasks. UORO balances two norms over all tasks, and draws signs. The noise differs,
#   so do the numbers.
# - BOME has one barrier for the sum over tasks.
#
# A fitted $\theta$ of HyperDistill is such a number too: fit it in one place, and give it to all. If the outer loss is a mean over tasks
# (`model.objective()`), divide the sum by the number of processes, and give each the same number of tasks. A bound on the
# hypergradient's norm belongs behind the sum.

# %%
folder.cleanup()

# %% [markdown]
# ## Where to go next
#
# - [Tune rates and decays](04_tune_rates_and_decays.ipynb): the two loops of this page, and what they find.
# - [Long runs](07_long_runs.ipynb): what to do when a run's states do not fit in memory.
# - [MAML, Meta-SGD, ANIL and Reptile](03_maml_and_friends.ipynb): meta-batches of tasks in one process.
