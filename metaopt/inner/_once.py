"""What a compiled chunk of steps computes more than once, computed once: features of a batch that the steps share, for example."""

from __future__ import annotations

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._ops import OpOverload
from torch.fx import Graph


class Once(CustomGraphPass):
    """Common subexpression elimination, which inductor leaves to its callers; random and mutating operations are never joined."""

    def __call__(self, graph: Graph) -> None:
        """In place, first come first kept. Users of a removed node are rewritten at once, so that equal towers fall together in one walk."""
        kept: dict[tuple[object, str, str], torch.fx.Node] = {}
        for node in list(graph.nodes):
            target = node.target
            if not isinstance(target, OpOverload) or torch.Tag.nondeterministic_seeded in target.tags or target._schema.is_mutable:
                continue
            first = kept.setdefault((target, str(node.args), str(node.kwargs)), node)  # as text: 1, 1.0 and True are different arguments
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)

    def uuid(self) -> str:
        """The compiler keeps its results under this name."""
        return "metaopt: every subexpression once"
