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

# %%

# %% [markdown]
# # Which training text mattered?
#
# Training used many texts. Which of them helped on the text that matters, and which did harm? The honest answer is to train again without
# each text. That is one training run per text.
#
# A hypergradient answers for all texts at once. Give each text a weight, all equal to 1. The derivative of the validation loss with respect
# to a weight says what a little more of that text would have done. This page computes it exactly, through every Adam step of a small
# transformer. Then it checks the answer by really training again.

# %%
import warnings

import matplotlib.pyplot as plt
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.nn.functional import cross_entropy

import metaopt as mo

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)

# %% [markdown]
# ## 1. Three kinds of text
#
# The model reads letters and predicts the next one. The validation text is about gradients. Of the training texts, a third continues that
# subject, a third is about something else, and a third is the first kind with its letters shuffled.

# %%
SUBJECT = (
    "the inner loop fits the weights to the training data. the outer loop asks how the data should have been weighted. "
    "both of them follow gradients. the gradient of the outer loss goes back through every step of the inner loop. "
    "a step that was taken early is seen through all the steps that came after it. "
    "the outer gradient says which weights of the data should grow and which of them should shrink. "
)
OTHER = (
    "rain fell over the harbour from noon on. a grey boat came in with nobody on deck. gulls sat upon its roof. "
    "my uncle quickly put down his cup and ran out, for he had known that boat when he was a boy of six. "
    "fog hid whatever else lay on the bay. by dusk a lamp was lit up on board, and a woman sang. "
)
LENGTH = 24
STRIDE = 12

symbols = sorted(set(SUBJECT + OTHER))


def windows(text):
    ids = torch.tensor([symbols.index(c) for c in text])
    return ids.unfold(0, LENGTH + 1, STRIDE)


def shuffled(rows):
    return torch.stack([row[torch.randperm(len(row))] for row in rows])


about = windows(SUBJECT)
validation_rows = about[-14:]
same = about[:12]
kinds = {"same subject": same, "another subject": windows(OTHER)[:12], "shuffled letters": shuffled(same)}
texts = torch.cat(list(kinds.values()))
kind_of = [name for name, rows in kinds.items() for _ in rows]
N = len(texts)


def read(row):
    return "".join(symbols[i] for i in row)


for name, rows in kinds.items():
    print(f"{name:17} {len(rows)} texts, such as {read(rows[1])!r}")

# %% [markdown]
# ## 2. A transformer, and a weight for each text
#
# `mo.models.DataWeights` wraps the module. Its hyperparameter $\lambda$ has one number for each text, and the inner loss is
#
# $$L(w, \lambda) = \frac{1}{n} \sum_k \lambda_{i_k}\, \ell(w; \text{text } i_k).$$
#
# Two choices keep the training smooth in $\lambda$: GELU instead of ReLU, and a large `eps` in Adam. Section 5 shows why.


# %%
class Transformer(nn.Module):
    def __init__(self, width=24):
        super().__init__()
        self.embed = nn.Embedding(len(symbols), width)
        self.place = nn.Parameter(0.1 * torch.randn(LENGTH, width))
        self.block = nn.TransformerEncoderLayer(width, 2, 48, dropout=0.0, activation="gelu", batch_first=True)
        self.predict = nn.Linear(width, len(symbols))

    def forward(self, x):
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return self.predict(self.block(self.embed(x) + self.place, src_mask=future))


def per_text(scores, targets):
    return cross_entropy(scores.mT, targets, reduction="none").mean(-1)


T = 60
BATCH = 12
chosen = [torch.randperm(N)[:BATCH] for _ in range(T)]
batches = [(texts[i, :-1], texts[i, 1:], i) for i in chosen]
validation = (validation_rows[:, :-1], validation_rows[:, 1:])

model = mo.models.DataWeights.of(Transformer(), per_text, examples=N)
step = mo.inner_step(model.inner_loss, mo.optim.Adam(lr=0.01, eps=1e-2))
w0, ones = model.init()
print(f"{sum(x.numel() for x in w0.values()):,} weights, {N} texts, {T} steps of {BATCH} texts")

# %% [markdown]
# ## 3. One exact hypergradient
#
# `RMD` goes back through all steps, Adam's two moments included. `Checkpointed` keeps a few states and runs the rest again, so that memory
# stays small in long runs. A warning says that attention runs on the kernel that can be differentiated twice.

# %%
with warnings.catch_warnings():
    warnings.simplefilter("ignore", mo.inner.MathAttentionWarning)
    problem = mo.Problem(step, model.outer_loss, w0, ones, batches, validation)
    hg = problem.hypergradient(mo.RMD(mo.trajectory.Checkpointed()))
hg

# %% [markdown]
# A negative entry says: with more of this text, the validation loss would have been lower. `-hg.total` is thus how much each text helped.

# %%
helped = -hg.total
order = helped.argsort(descending=True)
for title, which in (("helped most", order[:3]), ("did most harm", order[-3:].flip(0))):
    print(title)
    for i in which:
        print(f"  {helped[i]:+.4f}  {kind_of[i]:17} {read(texts[i])!r}")

# %% [markdown]
# ## 4. Checked by training again
#
# First the number itself. The weight of one text is moved by a thousandth in both directions, and the model is trained again both times.


# %%
def trained_loss(weights, step=step):
    with torch.no_grad():
        state = step.init(w0, weights)
        for batch in batches:
            state = step(state, weights, batch)
        return model.outer_loss(state.w, weights, validation).item()


def moved(i, by):
    weights = ones.clone()
    weights[i] += by
    return weights


print(f"{'text':>4} {'hypergradient':>14} {'trained twice':>14}")
for i in (order[0], order[N // 2], order[-1]):
    quotient = (trained_loss(moved(i, 1e-3)) - trained_loss(moved(i, -1e-3))) / 2e-3
    print(f"{i:4d} {hg.total[i]:14.7f} {quotient:14.7f}")
    assert abs(hg.total[i].item() - quotient) < 1e-4 * hg.total.abs().max().item()

# %% [markdown]
# They agree. Now the question that was asked at the start: what if the text had not been there at all? Each text is left out in turn, and the
# model is trained again from the same weights. That takes one run per text.
#
# The hypergradient is a derivative at weight 1, and leaving a text out is a step all the way to 0. So the two need not be equal. A step of a
# tenth, whose effect is multiplied by ten, shows how much of the difference is due to the length of the step.


# %%
def effect_of_less(amount, step=step):
    full = trained_loss(ones, step)
    return torch.tensor([trained_loss(moved(i, -amount), step) - full for i in range(N)]) / amount


left_out = effect_of_less(1.0)
a_tenth_less = effect_of_less(0.1)
rank = {name: spearmanr(helped, y).statistic for name, y in (("without it", left_out), ("a tenth less", a_tenth_less))}
print(f"rank correlation of one hypergradient with {N} runs:", ", ".join(f"{name} {r:.2f}" for name, r in rank.items()))
for name in kinds:
    mine = torch.tensor([k == name for k in kind_of])
    print(
        f"{name:17} mean of the hypergradient {helped[mine].mean():+.4f}, of leaving out {left_out[mine].mean():+.4f}"
    )
assert rank["a tenth less"] > 0.9
assert rank["without it"] > 0.9

# %% [markdown]
# For small steps the derivative is the effect, and for leaving out it ranks the texts almost as the runs do. Its price is one run and
# the way back.
#
# ## 5. When an exact gradient says little
#
# The first step of Adam is nearly $-\alpha\, g / (|g| + \epsilon)$. With the usual $\epsilon = 10^{-8}$ that is the sign of the gradient, which
# jumps where an entry of $g$ changes sign. The derivative is then exact and yet holds only in a tiny neighbourhood. A larger $\epsilon$ makes
# the training smooth in $\lambda$.

# %%
print(f"{'eps':>7} {'rank correlation with a tenth less':>36} {'validation loss':>16}")
for eps in (1e-8, 1e-4):
    other = mo.inner_step(model.inner_loss, mo.optim.Adam(lr=0.01, eps=eps))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mo.inner.MathAttentionWarning)
        found = mo.hypergradient(other, model.outer_loss, w0, ones, batches, validation)
    agreement = spearmanr(-found.total, effect_of_less(0.1, other)).statistic
    print(f"{eps:7.0e} {agreement:36.2f} {found.outer_loss:16.3f}")
print(f"{1e-2:7.0e} {rank['a tenth less']:36.2f} {hg.outer_loss:16.3f}")

# %% [markdown]
# ## 6. The picture

# %%
COLOURS = dict(zip(kinds, ("#0072B2", "#E69F00", "#666666"), strict=True))
MARKS = dict(zip(kinds, "os^", strict=True))
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
for name in kinds:
    mine = torch.tensor([k == name for k in kind_of])
    left.scatter(helped[mine], left_out[mine], color=COLOURS[name], marker=MARKS[name], label=name, s=36)
left.scatter(helped, a_tenth_less, s=10, color="#222222", marker="+", lw=0.8, label="a tenth less, times ten")
ends = [helped.min(), helped.max()]
left.plot(ends, ends, color="#bbbbbb", lw=1, zorder=0)
left.axhline(0, color="#dddddd", lw=0.8, zorder=0)
left.axvline(0, color="#dddddd", lw=0.8, zorder=0)
left.set(xlabel="how much it helped, by one hypergradient", ylabel="loss without it, minus loss of the full run")
left.set_title(f"One hypergradient against {N} training runs")
left.legend(frameon=False, fontsize=9)

rows = range(N)
right.barh(rows, helped[order.flip(0)], color=[COLOURS[kind_of[i]] for i in order.flip(0)], height=0.8)
right.set(yticks=[], xlabel="how much it helped", title="All texts, from most harmful to most helpful")
for place, i in ((0, order[-1]), (N - 1, order[0])):
    inside = helped[i] > 0
    right.annotate(
        read(texts[i]), (0, place), (-6 if inside else 6, 0), textcoords="offset points", va="center", fontsize=8,
        ha="right" if inside else "left", family="monospace", color=COLOURS[kind_of[i]],
    )  # fmt: skip
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## Where to go next
#
# - [Data weights](examples/data_weights.py) is this job as a short script, beside a plain loop that keeps every graph.
# - [Your first hypergradient](01_first_hypergradient.ipynb) explains exact reverse mode and its trajectories.
# - [Tune rates and decays](04_tune_rates_and_decays.ipynb) moves $\lambda$ by the hypergradient instead of reading it.
