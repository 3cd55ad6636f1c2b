"""Distilled batches: an example is one row of every tensor, or an error."""

import numpy as np
import pytest
import torch

import metaopt as mo
from metaopt.trajectory import Distilled

STATE = mo.InnerState(torch.zeros(1), {}, 0)


def mixed(old, new, **settings):
    memory = Distilled(1.0, **settings)
    return memory.append(memory.start(STATE, old), STATE, new).batch


def rows(start, count=4):
    return torch.arange(start, start + count)


def test_inputs_and_labels_stay_together():
    old = {"x": rows(0)[:, None] * torch.ones(3), "y": rows(0), "mask": None, "name": "a"}
    new = {"x": rows(10)[:, None] * torch.ones(3), "y": rows(10), "mask": None, "name": "b"}
    batch = mixed(old, new)
    assert torch.equal(batch["x"][:, 0].long(), batch["y"])
    assert (batch["y"] < 10).sum() == 2
    assert batch["name"] == "b"


def test_a_smaller_last_batch_is_mixed_too():
    batch = mixed({"x": rows(0, 6).float(), "y": rows(0, 6)}, {"x": rows(10, 2).float(), "y": rows(10, 2)})
    assert torch.equal(batch["x"].long(), batch["y"]) and len(batch["y"]) == 2 and (batch["y"] < 10).sum() == 1


def test_what_has_no_rows_is_the_newest():
    batch = mixed((rows(0), torch.tensor(1.0), torch.ones(7)), (rows(10), torch.tensor(2.0), torch.zeros(7)))
    assert batch[1] == 2.0 and torch.equal(batch[2], torch.zeros(7))


def test_dynamic_padding_is_refused_with_the_remedy():
    """Labels have the same shape in both batches, inputs have not: pairs would come apart."""
    old = {"input_ids": torch.zeros(4, 9), "labels": rows(0)}
    new = {"input_ids": torch.zeros(4, 7), "labels": rows(10)}
    with pytest.raises(ValueError, match=r"input_ids.*\(4, 9\) and \(4, 7\): pad all batches to one length"):
        mixed(old, new)


class Opaque:
    x = torch.zeros(4)


@pytest.mark.parametrize("leaf", [np.zeros(4), Opaque()], ids=lambda leaf: type(leaf).__name__)
def test_what_cannot_be_looked_into_is_refused(leaf):
    with pytest.raises(TypeError, match="its examples would be left out"):
        mixed(
            {"x": rows(0), "other": leaf},
            {"x": rows(10), "other": type(leaf)() if isinstance(leaf, Opaque) else leaf + 1},
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "estimator",
    [mo.EvoGrad(), mo.DARTS(), mo.SAMA(), mo.AntitheticES(), mo.NRES(), mo.PES()],
    ids=lambda e: type(e).__name__,
)
def test_steps_below_the_rounding_are_refused(estimator, dtype):
    step = mo.inner_step(lambda w, lam, _: (lam * w.square()).sum(), mo.optim.SGD(lr=0.1))
    w = torch.ones(3, dtype=dtype)
    lam = torch.ones(3, dtype=dtype)
    with pytest.raises(ValueError, match=r"hardly resolves.*keep them in float32"):
        mo.hypergradient(step, lambda w, lam, _: w.sum(), w, lam, [None] * 3, None, estimator=estimator)
