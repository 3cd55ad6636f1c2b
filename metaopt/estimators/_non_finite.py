"""Where the first number that is not finite arose: found out by running again, once something has gone wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from metaopt import replay, tree
from metaopt.inner.contract import Step
from metaopt.inner.state import InnerState
from metaopt.replay import Rng
from metaopt.tree import Tree


def first_non_finite(step: Step, state: InnerState, lam: Tree, batches: Iterator[Any], rng: Rng) -> str | None:
    """What it is, with its step; ``None`` where all of the run is finite. Cost: the plain run."""
    if bad := tree.first_non_finite(lam):
        return f"lam{bad}"
    if bad := tree.first_non_finite(state):
        return f"the initial state at {bad}"
    with replay.repeated(rng), torch.no_grad():
        for batch in batches:
            if bad := tree.first_non_finite(batch):
                return f"the batch of step {state.t + 1} at {bad}"
            state, loss = step.evaluate(state, lam, batch)
            if loss is not None and not bool(torch.isfinite(loss)):
                return f"the inner loss of step {state.t}, which is {float(loss):g} (a lower learning rate, clipping)"
            if bad := tree.first_non_finite(state):
                return f"the state after step {state.t} at {bad}: the run diverged (a lower learning rate, clipping)"
    return None
