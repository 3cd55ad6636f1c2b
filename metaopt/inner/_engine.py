"""Backward passes without what ``torch.autograd.grad`` does around them in Python.

On a tiny net that is a fifth of a pass. Two things are left out: its checks of the seeds, which the
engine repeats, and the dispatch to classes that override ``torch`` functions. If torch has moved its
inner call elsewhere, ``torch.autograd.grad`` itself is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.autograd.graph
from torch import Tensor

_run: Any = getattr(torch.autograd.graph, "_engine_run_backward", None)


def products(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    seeds: Sequence[Tensor],
    *,
    create_graph: bool = False,
    retain_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """The cotangents of ``inputs`` for those of ``outputs``; ``None`` where nothing depends on one.

    A graph that is created keeps the old one.
    """
    retain_graph = retain_graph or create_graph
    if _run is None:
        return torch.autograd.grad(outputs, inputs, seeds, retain_graph, create_graph, allow_unused=True)
    return _run(
        tuple(outputs),
        tuple(seeds),
        retain_graph,
        create_graph,
        tuple(inputs),
        allow_unreachable=True,
        accumulate_grad=False,
    )
