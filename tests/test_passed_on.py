"""Steps that hand tensors on: a leaf of the new state is one of the old, in another place, as it is or mixed with others."""

import pytest
import torch
from cases import TRAJECTORIES
from hypothesis import given
from hypothesis import strategies as st

import metaopt as mo
from metaopt import tree

T = 6
SIZES = (8, 300, 3000)  # float64: below what is copied, above 4 KiB sixteen times, above 64 KiB in all


def passing_on(order, mixed):
    """A step that permutes the leaves of its slots; those numbered in ``mixed`` are moved as well, by w and λ."""

    def fn(state, lam, batch):
        old = state.slots["line"]
        line = [old[i] for i in order]
        for i in mixed:
            line[i] = line[i] + 0.2 * torch.sin(3.0 * state.w["a"] * lam["scale"]) * old[(i + 1) % len(old)]
        w = {"a": state.w["b"], "b": state.w["a"] - 0.3 * lam["scale"] * line[0] + 0.1 * batch * lam["shift"]}
        return mo.InnerState(w, {"line": line})

    def init(w, lam):
        return mo.InnerState(w, {"line": [torch.cos(w["a"] + i) for i in range(len(order))]})

    return mo.custom_step(fn, init)


def problem(order, mixed, size, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    w = {"a": draw(size), "b": draw(size)}
    batches = [draw(size) for _ in range(T)]
    lam = {"scale": draw(), "shift": draw(size)}
    return passing_on(order, mixed), outer, w, lam, batches, None


def outer(w, lam, batch):
    return (w["a"] ** 3).mean() + (w["b"] * w["a"].flip(0)).mean()


def by_autograd(step, outer_loss, w, lam, batches, outer_batch):
    lam = tree.attach(lam)
    state = step.init(w, lam)
    for batch in batches:
        state = step(state, lam, batch)
    loss = outer_loss(state.w, lam, outer_batch)
    return tree.unflatten(torch.autograd.grad(loss, tree.leaves(lam)), tree.flatten(lam)[1])


def through_unroll(step, outer_loss, w, lam, batches, outer_batch, estimator):
    lam = tree.attach(lam)
    last = mo.unroll(step, w, lam, batches, estimator=estimator).w
    loss = outer_loss(last, lam, outer_batch)
    return tree.unflatten(torch.autograd.grad(loss, tree.leaves(lam)), tree.flatten(lam)[1])


def close(got, expected):
    for x, y in zip(tree.leaves(got), tree.leaves(expected), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)
        assert float(y.norm()) > 1e-6


SWEEPS = {case.name: (lambda case=case: mo.RMD(case.make(T))) for case in TRAJECTORIES if case.full}
SWEEPS["TruncatedRMD"] = lambda: mo.TruncatedRMD(T)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sweep", SWEEPS)
def test_a_delay_line_over_every_trajectory(sweep, size):
    args = problem(order=(1, 2, 0), mixed=(2,), size=size)
    expected = by_autograd(*args)
    estimator = SWEEPS[sweep]()
    close(mo.hypergradient(*args, estimator=estimator).total, expected)
    close(through_unroll(*args, estimator=estimator), expected)


@given(
    order=st.integers(1, 5).flatmap(lambda n: st.permutations(range(n))),
    kept=st.integers(0, 31),
    size=st.sampled_from(SIZES),
    seed=st.integers(0, 1000),
)
def test_any_permutation_of_leaves(order, kept, size, seed):
    mixed = [i for i in range(len(order)) if not kept >> i & 1]
    args = problem(order, mixed, size, seed)
    close(mo.hypergradient(*args, estimator=mo.RMD()).total, by_autograd(*args))


@pytest.mark.parametrize("size", SIZES)
def test_drmad_where_the_derivative_does_not_depend_on_the_state(size):
    """A linear step: the straight line then gives the exact answer."""

    def init(w, lam):
        return mo.InnerState(w, {"line": [torch.zeros_like(w["w"])] * 3})

    def linear(state, lam, batch):
        a, b, c = state.slots["line"]
        return mo.InnerState({"w": state.w["w"] + a - 0.5 * b}, {"line": [b, c, a + batch * lam]})

    step = mo.custom_step(linear, init)
    w = {"w": torch.randn(size, dtype=torch.float64)}
    lam = torch.randn(size, dtype=torch.float64)
    batches = [torch.randn(size, dtype=torch.float64) for _ in range(T)]
    args = step, lambda w, lam, _: (w["w"] ** 2).mean(), w, lam, batches, None
    close(mo.hypergradient(*args, estimator=mo.DrMAD()).total, by_autograd(*args))
