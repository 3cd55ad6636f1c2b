"""Hypothesis strategies: random problems and random λ to hold an estimator, or a step Φ, to.

.. code-block:: python

    @given(problem=mo.verify.strategies.closed_forms() | mo.verify.strategies.mlp_problems())
    def test_mine(problem): ...

A :class:`~metaopt.verify.Problem` has all that :func:`metaopt.hypergradient` takes, and the exact
answer: ``problem.exact(T)`` for closed forms, :func:`metaopt.verify.reference.through_loop` for all
of them. Hypothesis is loaded when a strategy is asked for.
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from metaopt import tree
from metaopt.inner.step import inner_step
from metaopt.optim.adam import Adam
from metaopt.optim.optimizer import Optimizer
from metaopt.optim.rmsprop import RMSprop
from metaopt.optim.sgd import SGD
from metaopt.tree import Tree
from metaopt.verify.case import Case
from metaopt.verify.cases import CLOSED_FORMS

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    Problems: TypeAlias = SearchStrategy[Case]

OPTIMIZERS: tuple[Optimizer, ...] = (
    SGD(lr=0.1),
    SGD(lr=0.1, momentum=0.8, nesterov=True),
    Adam(lr=0.05, eps=1e-2),
    RMSprop(lr=0.05, eps=1e-1),
)
"""What :func:`mlp_problems` trains with; all smooth enough for finite differences."""


def closed_forms(
    makers: Sequence[Callable[..., Case]] = CLOSED_FORMS,
    *,
    max_size: int = 4,
    max_conditioning: float = 20.0,
    max_horizon: int = 5,
) -> Problems:
    """Closed forms with random size, conditioning and seed.

    The horizon is ``len(problem.batches)``, and ``problem.exact(T)`` the answer.

    Args:
        makers: which.
        max_size: largest number of weights.
        max_conditioning: largest ratio of the Hessian's eigenvalues.
        max_horizon: largest T.

    Raises:
        ModuleNotFoundError: without hypothesis.
    """
    st = _hypothesis()
    sizes = {"size": st.integers(1, max_size), "conditioning": st.floats(1.0, max_conditioning)}
    make = st.sampled_from(list(makers))
    seeds = st.integers(0, 10_000)
    horizons = st.integers(1, max_horizon)
    return st.builds(lambda make, **draw: make(**draw), make, seed=seeds, horizon=horizons, **sizes)


def pytrees(*, max_leaves: int = 4, max_side: int = 3) -> SearchStrategy[Tree]:
    """Nested dicts, lists and tuples of float64 tensors with entries of order 1; at least one leaf.

    Args:
        max_leaves: largest number of tensors, about.
        max_side: longest side of one.

    Raises:
        ModuleNotFoundError: without hypothesis.
    """
    st = _hypothesis()
    shapes = st.lists(st.integers(1, max_side), max_size=2).map(tuple)
    seeds = st.integers(0, 10_000)

    def tensor(shape: tuple[int, ...], seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return _normal(generator, *shape)

    def nested(inner: Any) -> Any:
        names = st.sampled_from("abcd")
        named = st.dictionaries(names, inner, min_size=1, max_size=3)
        listed = st.lists(inner, min_size=1, max_size=3)
        pairs = st.tuples(inner, inner)
        return named | listed | pairs

    tensors = st.builds(tensor, shapes, seeds)
    return st.recursive(tensors, nested, max_leaves=max_leaves)


def mlp_problems(
    *,
    lam: SearchStrategy[Tree] | None = None,
    optimizers: Sequence[Optimizer] = OPTIMIZERS,
    max_width: int = 3,
    max_horizon: int = 4,
) -> Problems:
    """Regression with a random tanh network.

    Every leaf of λ weighs the penalty of one of its weight tensors, and has a direct term.

    Args:
        lam: λ; default: :func:`pytrees`.
        optimizers: inner optimisers to draw from.
        max_width: most inputs, and hidden units; one or two layers.
        max_horizon: largest T.

    Raises:
        ModuleNotFoundError: without hypothesis.
    """
    st = _hypothesis()
    widths = st.lists(st.integers(1, max_width), min_size=1, max_size=2)
    seeds = st.integers(0, 10_000)
    horizons = st.integers(1, max_horizon)
    chosen = st.sampled_from(list(optimizers))
    if lam is None:
        lam = pytrees()
    return st.builds(_mlp, widths, chosen, lam, seeds, horizons)


def _mlp(widths: list[int], optimizer: Optimizer, lam: Tree, seed: int, horizon: int) -> Case:
    generator = torch.Generator().manual_seed(seed)
    sides = [*widths, 1]
    w0 = {}
    for i, (n, m) in enumerate(itertools.pairwise(sides)):
        w0[f"{i}.weight"] = _normal(generator, n, m) / math.sqrt(n)
    for i, m in enumerate(sides[1:]):
        w0[f"{i}.bias"] = 0.1 * _normal(generator, m)

    def error(w: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        for i in range(len(widths)):
            if i > 0:
                x = torch.tanh(x)
            x = x @ w[f"{i}.weight"] + w[f"{i}.bias"]
        return (x - y).square().mean()

    def inner_loss(w: Tree, lam: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        weights = tree.leaves(w)
        penalties = []
        for i, rate in enumerate(tree.leaves(lam)):
            weight = weights[i % len(weights)]
            penalties.append(_mixed(rate) * weight.square().mean())
        return error(w, batch) + 0.1 * torch.stack(penalties).sum()

    def outer_loss(w: Tree, lam: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        penalties = [rate.square().sum() for rate in tree.leaves(lam)]
        return error(w, batch) + 0.05 * torch.stack(penalties).sum()

    step = inner_step(inner_loss, optimizer)
    *batches, outer_batch = [(_normal(generator, 4, sides[0]), _normal(generator, 4, 1)) for _ in range(horizon + 1)]
    return Case(step, outer_loss, w0, lam, batches, outer_batch, name=f"MLP {sides}, seed {seed}")


def _mixed(rate: Tensor) -> Tensor:
    """A number to which every entry contributes differently."""
    waves = torch.sin(rate).reshape(-1)
    shares = torch.linspace(1.0, 2.0, rate.numel(), dtype=rate.dtype)
    return (waves * shares).sum().exp()


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _hypothesis() -> Any:
    try:
        return importlib.import_module("hypothesis.strategies")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "hypothesis":
            raise
        raise ModuleNotFoundError(
            "metaopt.verify.strategies draws with hypothesis: pip install hypothesis", name="hypothesis"
        ) from error
