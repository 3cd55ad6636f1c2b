"""Pytree arithmetic against torch's own pytrees."""

from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from metaopt import tree


class Pair(NamedTuple):
    a: object
    b: object


LEAVES = st.integers(0, 3).map(lambda n: torch.arange(float(n)))
TREES = st.recursive(
    LEAVES,
    lambda children: st.one_of(
        st.lists(children, max_size=3),
        st.tuples(children, children),
        st.dictionaries(st.sampled_from("abc"), children, max_size=3),
        st.builds(Pair, children, children),
        st.dictionaries(st.sampled_from("abc"), children, max_size=2).map(OrderedDict),
    ),
    max_leaves=8,
)


@given(TREES)
def test_walks_as_torch_does(t):
    assert [id(x) for x in tree.leaves(t)] == [id(x) for x in pytree.tree_leaves(t)]
    doubled = tree.map(lambda x: 2 * x, t)
    assert pytree.tree_structure(doubled) == pytree.tree_structure(t)
    assert all(torch.equal(x, 2 * y) for x, y in zip(tree.leaves(doubled), tree.leaves(t), strict=True))


@given(TREES)
def test_unflatten_inverts_flatten(t):
    flat, spec = tree.flatten(t)
    again = tree.unflatten(flat, spec)
    assert tree.flatten(again)[1] == spec
    assert all(x is y for x, y in zip(flat, tree.leaves(again), strict=True))
    assert len(tree.names(t)) == spec.num_leaves == len(flat)


@given(TREES)
def test_vector_space(t):
    zero = tree.zeros_like(t)
    assert float(tree.norm(tree.sub(tree.add(t, t), tree.scale(2.0, t)))) == 0.0
    assert float(tree.dot(t, zero)) == 0.0
    total = float(sum((x * x).sum() for x in tree.leaves(t)))
    assert float(tree.dot(t, t)) == pytest.approx(total)


def test_keys_may_come_in_another_order_but_must_be_the_same():
    assert (
        tree.sub({"a": torch.ones(1), "b": torch.zeros(1)}, {"b": torch.ones(1), "a": torch.ones(1)})["a"].item() == 0.0
    )
    with pytest.raises(ValueError, match="different keys"):
        tree.add({"a": torch.ones(1)}, {"b": torch.ones(1)})


def test_a_missing_leaf_counts_as_zero():
    assert tree.add({"a": None}, {"a": torch.ones(1)})["a"].item() == 1.0
    assert tree.add({"a": torch.ones(1)}, {"a": None})["a"].item() == 1.0
    assert tree.filled({"a": None}, {"a": torch.ones(2)})["a"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_leaves_are_found_and_named(bad):
    t = {"x": torch.ones(2), "y": [torch.tensor([1.0, bad])]}
    assert not tree.is_finite(t)
    assert tree.first_non_finite(t) == "['y'][0]"
    assert tree.is_finite({"x": torch.tensor(1e38).repeat(10)})  # a sum that overflows is no infinity


def test_accumulation_owns_its_total():
    first = {"a": torch.ones(2), "b": None, "c": None}
    second = {"a": torch.full((2,), 2.0), "b": torch.ones(1), "c": None}
    total = tree.accumulate(tree.map(lambda _: None, first), first)
    assert total["a"] is not first["a"]
    again = tree.accumulate(total, second)
    assert (
        again["a"] is total["a"]
        and torch.equal(again["a"], torch.full((2,), 3.0))
        and again["b"] is not second["b"]
        and again["c"] is None
    )
    assert torch.equal(first["a"], torch.ones(2))
