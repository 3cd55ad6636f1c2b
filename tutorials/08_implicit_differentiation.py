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
# # Implicit differentiation, and when it is wrong
#
# If training ends at a minimum, the run that led there does not matter. The weights $w^*(\lambda)$ are defined by a zero gradient,
# $\nabla_w L(w^*, \lambda) = 0$, and the implicit function theorem gives their derivative:
#
# $$\alpha\, \frac{dw^*}{d\lambda} = -\alpha\, H^{-1}\, \frac{\partial^2 L}{\partial w\, \partial \lambda}, \qquad H = \nabla_w^2 L.$$
#
# No trajectory is kept, however long the run was. That is `mo.IFT()`. The catch is in the first word: *if*. This page shows both sides on a
# problem whose answer is known in closed form.

# %%
import warnings

import matplotlib.pyplot as plt
import torch

import metaopt as mo

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)

# %% [markdown]
# ## 1. Ridge regression with a penalty for each input
#
# Twenty inputs, of which five matter. $\lambda$ is the logarithm of each input's penalty. The validation loss judges it.

# %%
INPUTS = 20
truth = torch.zeros(INPUTS)
truth[:5] = 1.0
scales = torch.logspace(0, -1, INPUTS)[torch.randperm(INPUTS)]


def data(n):
    x = torch.randn(n, INPUTS) * scales
    return x, x @ truth + 0.3 * torch.randn(n)


train = data(60)
validation = data(200)


def inner_loss(w, lam, batch):
    x, y = batch
    return 0.5 * ((x @ w - y) ** 2).mean() + 0.5 * (lam.exp() * w**2).sum()


def outer_loss(w, lam, batch):
    x, y = batch
    return 0.5 * ((x @ w - y) ** 2).mean()


lam = torch.full((INPUTS,), -3.0)
w0 = torch.zeros(INPUTS)
step = mo.inner_step(inner_loss, mo.optim.SGD(lr=0.5))

# %% [markdown]
# The minimum solves a linear system, so autograd can differentiate the solution itself. This is the right answer.


# %%
def minimum(lam):
    x, y = train
    return torch.linalg.solve(x.T @ x / len(y) + torch.diag(lam.exp()), x.T @ y / len(y))


with_grad = lam.clone().requires_grad_()
(right,) = torch.autograd.grad(outer_loss(minimum(with_grad), None, validation), with_grad)
print(f"norm of the right answer: {right.norm():.6f}")


def error(found):
    return ((found - right).norm() / right.norm()).item()


# %% [markdown]
# ## 2. At a solution, every solver is right
#
# `IFT` solves one linear system with the Hessian, by products alone. Any solver of `mo.linsolve` may do it. The run is long enough here.

# %%
LONG = 2000
problem = mo.Problem(step, outer_loss, w0, lam, [train] * LONG, validation)
solvers = {
    "conjugate gradients (default)": mo.IFT(),
    "GMRES": mo.IFT(mo.linsolve.GMRES(INPUTS)),
    "Neumann, 200 terms": mo.IFT(mo.linsolve.Neumann(200)),
    "Exact": mo.IFT(mo.linsolve.Exact()),
}
print(f"{'':30} {'error':>8}  products")
for name, estimator in solvers.items():
    found = problem.hypergradient(estimator)
    print(f"{name:30} {error(found.total):8.0e} {found.cost.products:9d}")
    assert error(found.total) < (1e-2 if "Neumann" in name else 1e-6)
reverse = problem.hypergradient(mo.RMD())
print(f"{'RMD through all 2000 steps':30} {error(reverse.total):8.0e} {reverse.cost.products:9d}")

# %% [markdown]
# The same number for a hundredth of the products, and for no memory of the run. The Neumann series converges as slowly as gradient descent
# itself, since its terms are the steps of the run.
#
# ## 3. Before a solution, it answers another question
#
# Stop the run early. `RMD` gives the derivative of the weights that were *reached*. `IFT` puts them into a formula that holds at the minimum. It
# warns, since the gradient is not small.

# %%
early = mo.Problem(step, outer_loss, w0, lam, [train] * 10, validation)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    early.hypergradient(mo.IFT())
print(caught[0].message)

# %% [markdown]
# How wrong is it? That depends on the question. Two can be asked at step $T$:
#
# - *What is the derivative of this run's loss?* The truth is `RMD`, and the error of `IFT` is against that.
# - *What is the derivative at the minimum?* The truth is the closed form, and now `RMD` of a short run is wrong as well.

# %%
HORIZONS = [2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000]
quiet = mo.IFT(converged=None)
rows = []
for T in HORIZONS:
    short = mo.Problem(step, outer_loss, w0, lam, [train] * T, validation)
    run = short.hypergradient(mo.RMD()).total
    implicit = short.hypergradient(quiet).total
    truncated = short.hypergradient(mo.TruncatedRMD(min(20, T))).total
    against_run = ((implicit - run).norm() / run.norm()).item()
    rows.append((against_run, error(implicit), error(run), error(truncated)))
print(f"{'T':>5}  IFT against the run | IFT, RMD, TruncatedRMD(20) against the minimum")
for T, row in zip(HORIZONS, rows, strict=True):
    print(f"{T:5d} {row[0]:19.0e}  |", *[f"{value:8.0e}" for value in row[1:]])
against_run, implicit, whole, truncated = zip(*rows, strict=True)
assert against_run[0] > 1
assert against_run[-1] < 1e-3

# %% [markdown]
# In the first steps `IFT` is wrong about the run by more than the whole size of the answer. Near the solution it is right about both questions.
# About the minimum, `IFT` is ahead of `RMD` until it meets the tolerance of its solver: it asks only where the weights are, not how they
# came there.
# `TruncatedRMD(20)` stays wrong however long the run is: twenty steps do not reach far enough back in the flat directions.
#
# ## 4. The picture

# %%
BLUE = "#0072B2"
ORANGE = "#D55E00"
GREEN = "#009E73"
GREY = "#666666"
figure, (left, right_axes) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
left.loglog(HORIZONS, against_run, "o-", color=ORANGE)
left.annotate("IFT", (HORIZONS[5], against_run[5]), (8, 0), textcoords="offset points", color=ORANGE)
left.axhline(1, color="#bbbbbb", lw=1)
left.annotate("as wrong as no answer", (HORIZONS[-1], 1), (0, 4), textcoords="offset points", color="#888888", ha="right")
left.set(title="Derivative of this run's loss", xlabel="steps of the run, T", ylabel="relative error")
for values, colour, mark, name, at, shift in (
    (implicit, ORANGE, "o-", "IFT", 6, (-28, -6)),
    (whole, BLUE, "s-", "RMD", 7, (8, 4)),
    (truncated, GREEN, "^-", "TruncatedRMD(20)", 7, (-20, -14)),
):
    right_axes.loglog(HORIZONS, values, mark, color=colour)
    right_axes.annotate(name, (HORIZONS[at], values[at]), shift, textcoords="offset points", color=colour)
right_axes.axhline(1, color="#bbbbbb", lw=1)
right_axes.set(title="Derivative at the minimum", xlabel="steps of the run, T")
for axes in (left, right_axes):
    axes.spines[["top", "right"]].set_visible(False)
figure.suptitle("Implicit differentiation is right once the run has converged, and not before", fontweight="bold")
plt.show()

# %% [markdown]
# ## 5. What it cannot see
#
# At the minimum the learning rate plays no part: $w^*$ is the same for every rate. So a rate has no implicit derivative. It is refused by
# name instead of a zero.

# %%
rated = mo.inner_step(lambda w, _, batch: inner_loss(w, lam, batch), mo.optim.SGD(lr=mo.by("lr")))
try:
    mo.hypergradient(rated, outer_loss, w0, {"lr": torch.tensor(0.5)}, [train] * 50, validation, estimator=quiet)
except ValueError as refused:
    print(refused)

# %% [markdown]
# ## Where to go next
#
# - [Your first hypergradient](01_first_hypergradient.ipynb): exact reverse mode, which asks for no minimum.
# - [Implicit MAML](examples/implicit_maml.py): the same solver around a meta-learned initialisation.
# - `mo.diagnose.compare([...], problem)` holds `IFT` against the exact answer on your own problem.
