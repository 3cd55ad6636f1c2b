"""Rewrites of a compiled step's graph before inductor takes it: less to compute, and less to hold."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from operator import getitem
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch._ops import OpOverload
from torch.fx import Graph, Node

aten = torch.ops.aten
prims = torch.ops.prims


def join(graph: Graph) -> None:
    """Common subexpression elimination, in place, which inductor leaves to its callers.

    For example, the steps of a chunk may compute the same features of a batch.

    The first of several equal nodes is kept. Users of a removed node are rewritten at once, so one
    walk joins whole chains of equal nodes. Random operations are never joined. A graph with an
    operation that mutates is left as it is, since equal nodes might differ after the mutation.
    """
    operations = [(node, node.target) for node in graph.nodes if isinstance(node.target, OpOverload)]
    if _mutates(graph):
        return
    kept: dict[tuple[OpOverload, str, str], Node] = {}
    for node, target in operations:
        if torch.Tag.nondeterministic_seeded in target.tags:
            continue
        key = (target, str(node.args), str(node.kwargs))  # as text, since 1, 1.0 and True differ as arguments
        first = kept.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def spell_out(graph: Graph) -> None:
    """``a + alpha * b`` becomes a product and a sum.

    Inductor (torch 2.13) takes a sum with a matrix product for one call, and drops ``alpha``.
    """
    for node in list(graph.nodes):
        if node.target is aten.add.Tensor and node.kwargs:
            with graph.inserting_before(node):
                a, b = node.args
                alpha = node.kwargs["alpha"]
                scaled = _call(aten.mul.Tensor, b, alpha) if isinstance(b, Node) else b * alpha
                node.args = (a, scaled)
            node.kwargs = {}


def trim(graph: Graph) -> None:
    """A convolution's backward computes only those of its three gradients that are used.

    The gradient with respect to the weights costs as much as the one with respect to the images.
    """
    for node in graph.nodes:
        if node.target is aten.convolution_backward.default and all(user.target is getitem for user in node.users):
            used = {user.args[1] for user in node.users}
            *rest, mask = node.args
            mask = [wanted and place in used for place, wanted in enumerate(mask)]
            node.args = (*rest, mask)
            pairs = zip(node.meta["val"], mask, strict=True)
            values = tuple(value if wanted else None for value, wanted in pairs)
            node.meta = {**node.meta, "val": values}


def note(graph: Graph) -> None:
    """Max pooling stores which number of each window it took, one byte per window.

    Inductor would recompute that wherever it is needed, and hold the images for it: sixteen times as
    much memory for 2 × 2 windows. Where shapes are symbols, it still does.
    """
    from torch._inductor import inductor_prims  # here, since its import takes seconds

    # not every version of torch calls it that
    pooling = getattr(inductor_prims, "_low_memory_max_pool_with_offsets", None)
    for node in list(graph.nodes):
        if node.target is getitem and node.args[0].target is pooling and node.args[1] == 1:
            strides = list(node.meta["val"].stride())
            if all(isinstance(stride, int) for stride in strides):
                with graph.inserting_after(node):
                    # an operation that needs the numbers in memory
                    noted = graph.call_function(inductor_prims.force_stride_order, (node, strides))
                noted.meta = dict(node.meta)
                node.replace_all_uses_with(noted, delete_user_cb=lambda user, noted=noted: user is not noted)


def recompute(graph: Graph) -> None:
    """Rematerialise convolutions that make many numbers out of few, as the first one of a net does.

    Nodes that wait for a gradient get a second copy of the convolution, and of the element-wise
    functions of it. So its images need not be held until then. A zero computed from that gradient is
    added to the copy's input, so that no scheduler computes the copy early. A graph with an operation
    that mutates is left as it is.
    """
    if _mutates(graph):
        return
    place: dict[Node, int] = {}
    gradient: dict[Node, Node] = {}  # by images: the last one that a node waits for
    for node in graph.nodes:
        place[node] = len(place)
        if node.op == "output":
            continue
        if node.target is getitem and node.args[0].target is aten.convolution_backward.default and node.args[1] == 0:
            gradient[node] = node
        elif waited := [gradient[x] for x in node.all_input_nodes if x in gradient]:
            gradient[node] = max(waited, key=place.__getitem__)
    convolutions = [node for node in place if node not in gradient and node.target is aten.convolution.default]
    for node in reversed(list(place)):  # a node whose users all wait can wait as well
        if node not in gradient and node.users and all(user in gradient for user in node.users):
            first = min((gradient[user] for user in node.users), key=place.__getitem__)
            if place[first] < place[node]:
                gradient[node] = first
    for node in convolutions:
        if node not in gradient and _grows(node.args[0], node):
            _again(node, gradient)


def _again(convolution: Node, gradient: dict[Node, Node]) -> None:
    """Give the nodes that wait for a gradient a copy of this convolution."""
    graph = convolution.graph
    held = {convolution}
    copies = {}

    def copy(node: Node, late: Node) -> Node:
        if node not in copies and node is convolution:
            zero = _zero(late, node.meta["val"].dtype)
            images = _call(aten.add.Tensor, node.args[0], zero)
            copies[node] = _call(node.target, images, *node.args[1:])
        elif node not in copies:
            made = {x: copy(x, late) for x in node.all_input_nodes if x in held}
            copies[node] = graph.node_copy(node, lambda x: made.get(x, x))
        return copies[node]

    for node in list(graph.nodes):
        inputs = [x for x in node.all_input_nodes if x in held]
        if inputs and node in gradient:
            with graph.inserting_before(node):
                for x in inputs:
                    node.replace_input_with(x, copy(x, gradient[node]))
        elif inputs and isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags:
            held.add(node)


def _mutates(graph: Graph) -> bool:
    return any(isinstance(node.target, OpOverload) and node.target._schema.is_mutable for node in graph.nodes)


def _grows(taken: Any, made: Node) -> bool:
    """Whether eight numbers or more are made of each one; no where sizes are symbols."""
    few = taken.meta["val"].numel()
    many = made.meta["val"].numel()
    return isinstance(few, int) and isinstance(many, int) and many >= 8 * few


def _zero(late: Node, dtype: torch.dtype) -> Node:
    """A zero that depends on ``late``, so that it cannot be computed earlier."""
    for axis in range(late.meta["val"].ndim):
        late = _call(aten.slice.Tensor, late, axis, 0, 1)
    return _call(prims.convert_element_type.default, _call(aten.gt.Scalar, late, float("inf")), dtype)


def _call(target: Any, *args: Any) -> Node:
    """A call at the place where the graph inserts, with what the compiler needs to know of its result."""
    inputs = [arg for arg in args if isinstance(arg, Node)]
    node = inputs[0].graph.call_function(target, args)
    values = [arg.meta["val"] if isinstance(arg, Node) else arg for arg in args]
    with detect_fake_mode(values) or nullcontext():
        node.meta["val"] = target(*values)
    return node


def passes(*functions: Callable[[Graph], None]) -> Any:
    """Some of these functions in the form that inductor's option ``joint_custom_pre_pass`` takes."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files  # here: its import takes seconds

    class Passes(CustomGraphPass):
        def __call__(self, graph: Graph) -> None:
            for function in functions:
                function(graph)

        def uuid(self) -> Any:
            """The compiler keeps its results under this name."""
            return get_hash_for_files((__file__,), " ".join(function.__name__ for function in functions))

    return Passes()
