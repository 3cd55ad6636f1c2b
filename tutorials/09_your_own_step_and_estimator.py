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
# # Write and prove your own step and estimator
#
# An update rule of your own is a function. An estimator of your own is a class. Both plug in where the library's would, and nothing has to be
# registered. What takes work is to know that they are right: a wrong gradient rarely crashes.
#
# This page writes one of each. `mo.verify.check` proves them, and it also gets a wrong one of each to find.

# %%
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import metaopt as mo

torch.set_default_dtype(torch.float64)

# %% [markdown]
# ## 1. A step: an optimiser with learned coefficients
#
# The rule moves each parameter along three directions: the gradient $g$, its running mean $m$, and that mean divided by its running size, as
# in Adam. $\lambda$ holds the logarithms of three coefficients, for each parameter of the network:
#
# $$w \leftarrow w - e^{\lambda_1} g - e^{\lambda_2} m - e^{\lambda_3} \frac{m}{\sqrt{s}}, \qquad
#   m \leftarrow 0.9\, m + 0.1\, g, \qquad s \leftarrow 0.99\, s + 0.01\, g^2.$$
#
# The function takes a state, $\lambda$ and a batch, and returns a new state. `create_graph=True` keeps the gradient differentiable. `init` says
# what is in the slots before the first step.


# %%
def learned_rule(loss, create_graph=True):
    def rule(state, lam, batch):
        values = list(state.w.values())
        gradients = torch.autograd.grad(loss(state.w, batch), values, create_graph=create_graph)
        w = {}
        mean = {}
        square = {}
        for name, g in zip(state.w, gradients, strict=True):
            mean[name] = 0.9 * state.slots["mean"][name] + 0.1 * g
            square[name] = 0.99 * state.slots["square"][name] + 0.01 * g**2
            directions = torch.stack([g, mean[name], mean[name] / (square[name] + 1e-8).sqrt()])
            w[name] = state.w[name] - torch.tensordot(lam[name].exp(), directions, 1)
        return mo.InnerState(w, {"mean": mean, "square": square}, state.t + 1)

    return rule


def empty_slots(w, lam):
    return mo.InnerState(w, {"mean": mo.tree.zeros_like(w), "square": mo.tree.zeros_like(w)})


# %% [markdown]
# ## 2. Prove it
#
# The check takes a step at one point, in `float64`. It builds dense Jacobians, so a tiny network is the right size. Pure? The same when run again?
# Does every leaf of $\lambda$ matter? Do products forward and backward agree with each other, with dense matrices and with finite differences?

# %%
torch.manual_seed(0)
tiny = mo.functional(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)))
points = torch.randn(10, 3), torch.randn(10, 2)
coefficients = {name: torch.tensor([0.1, 0.2, 0.03]).log() for name in tiny.params}


def tiny_loss(w, batch):
    return F.mse_loss(tiny(w, batch[0]), batch[1])


right_step = mo.custom_step(learned_rule(tiny_loss), init=empty_slots)
report = mo.verify.check(right_step, tiny.params, coefficients, points)
print(report)
assert report.passed

# %% [markdown]
# ## 3. A wrong one
#
# This one takes the gradient without its graph. That runs, and even the weights are right. But the rule no longer knows that the gradient moves
# when the weights do.

# %%
without_graph = mo.custom_step(learned_rule(tiny_loss, create_graph=False), init=empty_slots)
wrong = mo.verify.check(without_graph, tiny.params, coefficients, points)
print(wrong)
assert [row.against for row in wrong.failures] == ["differences"]

# %% [markdown]
# Autograd agrees with itself everywhere, since the same wrong thing was said to it everywhere. Only the row of differences does not ask autograd,
# and it fails.
#
# ## 4. Let it learn
#
# Now the proven rule, on digits. A round takes a new network and new digits, trains for 20 steps, and moves $\lambda$ by the exact hypergradient of
# the validation loss. Adam and SGD, with momentum and without, get the same rounds to tune their one rate. All start from a modest guess. All
# move in logarithms, by the same outer optimiser.

# %%
T = 20
ROUNDS = 60
x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
torch.manual_seed(0)
order = torch.randperm(len(y))
x, y = x[order] / 16, y[order]
x = x - x[:700].mean(0)
new_train, new_test = (x[700:900], y[700:900]), (x[900:], y[900:])  # for later


def network(seed):
    torch.manual_seed(seed)
    return mo.functional(torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.Tanh(), torch.nn.Linear(16, 10)))


def digits(seed):
    chosen = torch.randperm(700, generator=torch.Generator().manual_seed(seed))
    return tuple((x[part], y[part]) for part in (chosen[:200], chosen[200:500]))


model = network(0)


def loss(w, batch):
    return F.cross_entropy(model(w, batch[0]), batch[1])


def with_lam(w, lam, batch):
    return loss(w, batch)


rate = mo.by("log_rate", torch.exp)
optimizers = {
    "SGD": mo.optim.SGD(lr=rate),
    "SGD, momentum": mo.optim.SGD(lr=rate, momentum=0.9),
    "Adam": mo.optim.Adam(lr=rate),
}
steps = {name: mo.inner_step(with_lam, optimizer) for name, optimizer in optimizers.items()}
steps["learned rule"] = mo.custom_step(learned_rule(loss), init=empty_slots)
starts = {name: {"log_rate": torch.tensor(value).log()} for name, value in zip(optimizers, (0.1, 0.1, 0.01), strict=True)}
starts["learned rule"] = {name: torch.tensor([0.1, 0.1, 0.01]).log() for name in model.params}


def learned(name):
    outer = mo.meta.OuterOptimizer(starts[name], lambda params: torch.optim.Adam(params, lr=0.1))
    for seed in range(ROUNDS):
        train, validation = digits(seed)
        w0 = network(seed).params
        hg = mo.hypergradient(steps[name], with_lam, w0, outer.lam, [train] * T, validation, estimator=mo.RMD())
        outer.update(hg.total)
    return outer.lam


found = {name: learned(name) for name in steps}
for name, logs in found["learned rule"].items():
    values = logs.exp()
    print(f"{name:9} gradient {values[0]:.3f}, mean {values[1]:.3f}, mean / size {values[2]:.3f}")
print(", ".join(f"{name}: rate {found[name]['log_rate'].exp():.3f}" for name in optimizers))

# %% [markdown]
# Does it carry over? Ten more networks are trained on digits that were not used so far, and judged on others still.


# %%
def curve(name, lam, seed):
    state = steps[name].init(network(seed).params, lam)
    losses = [loss(state.w, new_test).item()]
    for _ in range(T):
        state = steps[name](state, lam, new_train)
        losses.append(loss(state.w, new_test).item())
    return losses


SEEDS = range(1000, 1010)
runs = {name: (name, found[name]) for name in steps} | {"first guess": ("learned rule", starts["learned rule"])}
curves = {label: torch.tensor([curve(*run, seed) for seed in SEEDS]) for label, run in runs.items()}
for label, values in curves.items():
    last = values[:, -1]
    print(f"{label:14} test loss after {T} steps: {last.mean():.3f} ± {last.std():.3f} over {len(SEEDS)} networks")
ends = {label: values[:, -1] for label, values in curves.items()}
assert ends["learned rule"].mean() < min(ends[label].mean() for label in ("Adam", "SGD, momentum", "first guess"))
assert (ends["learned rule"].mean() - ends["SGD"].mean()).abs() < ends["learned rule"].std()

# %% [markdown]
# The rule ends below Adam and below SGD with momentum. It does not end below plain SGD: the two differ by less than two networks do.
#
# The gradient's coefficient at the weights has risen fifty times, to about 5. How much of the rule is that term? Leave out the two others.

# %%
alone = {name: torch.cat([logs[:1], torch.full((2,), -torch.inf)]) for name, logs in found["learned rule"].items()}
last = torch.tensor([curve("learned rule", alone, seed)[-1] for seed in SEEDS])
print(f"gradient term alone: test loss after {T} steps: {last.mean():.3f} ± {last.std():.3f}")
assert ends["learned rule"].mean() < last.mean() < ends["Adam"].mean()

# %% [markdown]
# Alone, the gradient term does most of the work: plain gradient descent with a large rate. The two others improve on it by less than a tenth.
# So twelve numbers found mostly what one number says. A comparison without plain SGD would have looked like a victory.
#
# ## 5. An estimator: reverse mode that fades
#
# Exact reverse mode sweeps back through all steps. `mo.TruncatedRMD(K)` stops after $K$ of them. Here is a softer cut: every step further back counts
# less, by a factor $\rho$:
#
# $$g_\rho = \sum_{t=1}^{T} \rho^{\,T-t}\; \alpha\, A_T \cdots A_{t+1}\, B_t, \qquad
#   A_t = \frac{\partial \Phi}{\partial s_{t-1}}, \quad B_t = \frac{\partial \Phi}{\partial \lambda}.$$
#
# With $\rho = 1$ it is exact, with $\rho = 0$ it is the 1-step method. An estimator is a frozen dataclass with three methods: `init` says what
# is remembered, `advance` takes a step and remembers it, and `respond` returns the weights and the map $\alpha \mapsto \alpha\, dw_T/d\lambda$.


# %%
@dataclass(frozen=True)
class Fading(mo.Estimator):
    """Reverse mode; each step further back counts less by the factor ``keep``."""

    keep: float

    online = False  # λ stays while the run lasts

    @property
    def exact(self):
        return self.keep == 1

    def init(self, step, state, lam):
        return ()

    def advance(self, step, state, lam, batch, carry):
        return step(state, lam, batch), (*carry, (state, batch))

    def respond(self, step, state, lam, carry):
        def pullback(alpha):
            cotangent = mo.InnerState(alpha, None, state.t)
            total = mo.tree.zeros_like(lam)
            for earlier, batch in reversed(carry):
                cotangent, part = step.vjp(earlier, lam, batch, cotangent)  # α A and α B
                total = mo.tree.add(total, mo.tree.filled(part, lam))
                cotangent = mo.tree.scale(self.keep, cotangent)
            return mo.Response(total)

        return state.w, pullback


exact = mo.verify.check(Fading(1.0))
silent = mo.verify.check(Fading(0.7))
print(f"Fading(1.0): {exact.verdict}")
print(f"Fading(0.7): {silent.verdict}\n    {silent.skipped[0]}")
assert exact.passed
assert not silent.passed

# %% [markdown]
# With $\rho = 1$ it says that it is exact, so it is held to ten closed forms at three horizons. With $\rho = 0.7$ it makes no claim, so there is
# nothing to hold it to. Give it one.
#
# ## 6. Its own formula
#
# The formula is written a second time, as slowly and plainly as can be: dense matrices $A$ and $B$ of each step, made without the step's own
# products. Beside it stands where theory makes it the exact answer.


# %%
def written_out(problem, horizon, estimator, alpha):
    states = mo.verify.reference.states(problem, horizon)
    total = 0.0
    for age, (A, B) in enumerate(reversed(mo.verify.reference.along(problem, states, horizon))):
        total = total + estimator.keep**age * (alpha @ B)
        alpha = alpha @ A
    return total


def exact_where(problem, horizon, estimator):
    if estimator.keep == 1:
        return "ρ = 1"
    return "T = 1" if horizon == 1 else None


formula = mo.verify.Formula(lambda problem, horizon: Fading(0.7), written_out, exact_where)
mo.verify.formulas.ENTRIES[Fading] = formula
for keep in (0.0, 0.7, 1.0):
    report = mo.verify.check(Fading(keep))
    print(f"Fading({keep}): {report.verdict}")
    assert report.passed

# %% [markdown]
# Now a wrong one, with a mistake that is easy to make: it fades before the first product instead of after it.


# %%
@dataclass(frozen=True)
class TooEarly(Fading):
    """The last step is faded as well."""

    def respond(self, step, state, lam, carry):
        point, pullback = super().respond(step, state, lam, carry)
        return point, lambda alpha: pullback(mo.tree.scale(self.keep, alpha))


for keep in (1.0, 0.7):
    print(f"TooEarly({keep}): {mo.verify.check(TooEarly(keep)).verdict}")
for row in mo.verify.check(TooEarly(0.7)).failures[:4]:
    print(f"   {row.case}, against {row.against}: error {row.error:.2f} {row.note and '(' + row.note + ')'}")
assert mo.verify.check(TooEarly(1.0)).passed
assert not mo.verify.check(TooEarly(0.7)).passed

# %% [markdown]
# The setting where the exact answer is known does not show the mistake, since $1 \cdot 1 = 1$. The formula does. The closed form does too, at
# $T = 1$, where every $\rho$ has to be exact.
#
# ## 7. Is it any good?
#
# It is proven to be what it says. That says nothing about its worth. Both cuts stand against exact `RMD`, on a run of the learned rule at its
# first guess. $1/(1-\rho)$ is the number of steps that a fading sum remembers, as $K$ is for truncation.

# %%
train, validation = digits(ROUNDS)
problem = mo.Problem(
    steps["learned rule"], with_lam, network(ROUNDS).params, starts["learned rule"], [train] * T, validation
)
assert mo.verify.check(Fading(1.0), problem=problem).passed

MEMORY = [1, 2, 3, 5, 8, 12, 16, 20, 50, 100, 200, 500, 1000]
fading = {f"fading {n}": Fading(1 - 1 / n) for n in MEMORY}
truncated = {f"truncated {n}": mo.TruncatedRMD(n) for n in MEMORY if n <= T}
measured = mo.diagnose.alignment(fading | truncated, problem, [T])
close = {point.estimator: point.total for point in measured.points}
print(f"{'steps':>5}  fading: cosine, error   truncated: cosine, error")
for n in MEMORY[:10]:
    soft = close[f"fading {n}"]
    hard = close.get(f"truncated {n}")
    print(f"{n:5d} {soft.cosine:15.3f} {soft.relative_error:7.3f}", f"{hard.cosine:18.3f} {hard.relative_error:7.3f}" if hard else "")
for n in MEMORY[1:8]:
    assert close[f"truncated {n}"].relative_error < close[f"fading {n}"].relative_error
assert close[f"truncated {T}"].relative_error < 1e-10
assert 4 < close["fading 200"].relative_error / close["fading 1000"].relative_error < 6  # in proportion to 1 - ρ

# %% [markdown]
# The hard cut has the smaller error at every length, and none at all from $K = T$ on. The error of the soft one falls in proportion to $1-\rho$.
# Its direction is a little better between 8 and 16 steps. And it keeps every state, so it saves nothing, while `TruncatedRMD` saves both
# memory and products. So this estimator is right, and here it is not worth its price.
#
# ## 8. The picture

# %%
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
YELLOW, GREY = "#E69F00", "#888888"
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
colours = {"SGD": YELLOW, "learned rule": BLUE, "Adam": GREEN, "SGD, momentum": ORANGE, "first guess": GREY}
height = -0.06
for label in sorted(colours, key=lambda label: curves[label][:, -1].mean()):
    mean = curves[label].mean(0)
    height = max(mean[-1], height + 0.11)  # labels keep their distance
    left.plot(range(T + 1), mean, color=colours[label], lw=2)
    left.plot([T + 0.2, T + 0.9], [mean[-1], height], color=colours[label], lw=0.7)
    left.annotate(label, (T + 1, height), color=colours[label], va="center")
left.set(xlabel="training step", ylabel="test loss, mean of ten new networks", ylim=(0, None), xlim=(0, T + 7))
left.set_title("The learned rule on new networks and new digits")
left.set_xticks([0, 5, 10, 15, 20])

for label, kind, colour, mark in (("Fading(ρ)", "fading", PINK, "o-"), ("TruncatedRMD(K)", "truncated", ORANGE, "s--")):
    steps_back = [n for n in MEMORY if f"{kind} {n}" in close]
    right.semilogx(steps_back, [close[f"{kind} {n}"].relative_error for n in steps_back], mark, color=colour, lw=2, ms=4)
right.annotate("Fading(ρ)", (50, close["fading 50"].relative_error), (8, 6), textcoords="offset points", color=PINK)
right.annotate("TruncatedRMD(K)", (8, close["truncated 8"].relative_error), (-10, -14), textcoords="offset points", color=ORANGE, ha="right")
right.annotate("exact at K = T", (T, 0), (6, 3), textcoords="offset points", color=ORANGE, fontsize="small")
right.set(xlabel="steps remembered: 1 / (1 - ρ), or K", ylabel="relative error to the exact hypergradient", ylim=(0, None))
right.set_title("A soft and a hard cut against their parameters")
figure.suptitle("The learned rule ends where plain SGD does; the soft cut is right, but not better than the hard one", fontweight="bold")
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## Where to go next
#
# - [Your first hypergradient](01_first_hypergradient.ipynb): the exact sweep that both cuts approximate.
# - [Which estimator?](06_which_estimator.ipynb): how to find out what an approximation is worth on your problem.
# - [Implicit differentiation](08_implicit_differentiation.ipynb): an estimator without any sweep.
# - [A learned optimiser](examples/learned_optimizer.py) as a short script, with a small network as the rule.
