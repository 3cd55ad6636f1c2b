"""What a compiled chunk of steps computes more than once, computed once: features of a batch that the steps share, for example."""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node


def join(graph: Graph) -> None:
    """Common subexpression elimination, in place, which inductor leaves to its callers.

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


def once() -> Any:
    """:func:`join` as a pass of inductor's."""
    from torch._inductor.custom_graph_pass import CustomGraphPass  # here, since whoever compiles nothing should not wait for the compiler's import

    class Once(CustomGraphPass):
        def __call__(self, graph: Graph) -> None:
            join(graph)

        def uuid(self) -> str:
            """The compiler keeps its results under this name."""
            return "metaopt: every subexpression once"

    return Once()
