"""What is done to the graph of a compiled step before inductor takes it: less is computed, and less of it is held."""

from __future__ import annotations

from collections.abc import Callable
from operator import getitem
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

aten = torch.ops.aten


def join(graph: Graph) -> None:
    """Common subexpression elimination, in place, which inductor leaves to its callers: steps of a chunk may share features of a batch, for example.

    First come first kept; users of a removed node are rewritten at once, so that equal towers fall together in one walk. Random operations are never
    joined, and a graph with an operation that mutates is left as it is: what was equal might be changed in between.
    """
    operations = [(node, node.target) for node in graph.nodes if isinstance(node.target, OpOverload)]
    if any(target._schema.is_mutable for _, target in operations):
        return
    kept: dict[tuple[OpOverload, str, str], Node] = {}
    for node, target in operations:
        if torch.Tag.nondeterministic_seeded in target.tags:
            continue
        first = kept.setdefault((target, str(node.args), str(node.kwargs)), node)  # as text: 1, 1.0 and True are different arguments
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def trim(graph: Graph) -> None:
    """A convolution's backward computes those of its three gradients that are used; those by the weights cost as much as those by the images."""
    for node in graph.nodes:
        if node.target is aten.convolution_backward.default and all(user.target is getitem for user in node.users):
            used = {user.args[1] for user in node.users}
            *rest, mask = node.args
            mask = [wanted and place in used for place, wanted in enumerate(mask)]
            node.args = (*rest, mask)
            node.meta = {**node.meta, "val": tuple(value if wanted else None for value, wanted in zip(node.meta["val"], mask, strict=True))}


def note(graph: Graph) -> None:
    """Max pooling writes down which number of a window it took, in a byte each.

    Inductor would find it out anew wherever it is needed, and hold the images for it: at 2 × 2 windows sixteen times as much. Left to it where
    shapes are symbols.
    """
    from torch._inductor import inductor_prims as prims  # as below

    pooling = getattr(prims, "_low_memory_max_pool_with_offsets", None)  # not every version of torch calls it that
    for node in list(graph.nodes):
        if node.target is getitem and node.args[0].target is pooling and node.args[1] == 1:
            strides = list(node.meta["val"].stride())
            if all(isinstance(stride, int) for stride in strides):
                with graph.inserting_after(node):
                    noted = graph.call_function(prims.force_stride_order, (node, strides))  # which needs the numbers in memory
                noted.meta = dict(node.meta)
                node.replace_all_uses_with(noted, delete_user_cb=lambda user, noted=noted: user is not noted)


def passes(*functions: Callable[[Graph], None]) -> Any:
    """As inductor's ``joint_custom_pre_pass``."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files  # here: its import takes seconds

    class Passes(CustomGraphPass):
        def __call__(self, graph: Graph) -> None:
            for function in functions:
                function(graph)

        def uuid(self) -> Any:
            """The compiler keeps its results under this name."""
            return get_hash_for_files((__file__,), " ".join(function.__name__ for function in functions))

    return Passes()
