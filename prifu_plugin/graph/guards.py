"""Guards: nodes by which a graph refuses inputs that it was not made for."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx

# A plan is recognized by its graph, guards included: plans of before are lost if this is reworded.
GUARD = (
    "This model was made for other input sizes: its forward decides on sizes, and for this input "
    "it would decide differently. Prune again with example_inputs= of this size."
)


SPLIT_GUARD = (
    "This model was split for other input sizes: its forward decides on sizes, and for this input "
    "it would decide differently. Split again with example_inputs= of this size."
)


def is_guard(node: fx.Node) -> bool:
    """Whether a node refuses inputs that a graph was not made for."""
    return node.target is torch._assert and node.args[1:] in ((GUARD,), (SPLIT_GUARD,))


def is_refusal(error: AssertionError) -> bool:
    """Whether a guard raised an error."""
    return str(error) in (GUARD, SPLIT_GUARD)


def drop_dtype_guards(graph: fx.Graph) -> None:
    """Erase guards of what was decided on the dtype of weights, which is another one in fp64."""
    for node in list(graph.nodes):
        if is_guard(node) and _asks_for_dtype(node):
            graph.erase_node(node)


def _asks_for_dtype(node: fx.Node) -> bool:
    if node.target is getattr and node.args[1] == "dtype":
        return isinstance(node.args[0], fx.Node) and node.args[0].op == "get_attr"
    questions = [n for n in node.all_input_nodes if n.target in (operator.eq, operator.ne, getattr)]
    return any(map(_asks_for_dtype, questions))


def fix_sizes(graph: fx.Graph, shapes: Sequence[tuple[int, ...]], *, batch: bool = False) -> None:
    """Let a graph refuse inputs whose sizes differ from these, in the batch too if asked."""
    places = [(at, dim) for at, shape in enumerate(shapes) for dim in range(len(shape))]
    fix_dims(graph, shapes, [(at, dim) for at, dim in places if batch or dim > 0])


def fix_dims(
    graph: fx.Graph, shapes: Sequence[tuple[int, ...]], places: Sequence[tuple[int, int]]
) -> None:
    """Let a graph refuse inputs whose sizes differ from these at some places.

    Args:
        graph: changed in place.
        shapes: one for each input.
        places: of inputs, and their dimensions.
    """
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_before(inputs[-1].next):
        for at, dim in places:
            asked = graph.call_method("size", (inputs[at], dim))
            same = graph.call_function(operator.eq, (asked, shapes[at][dim]))
            graph.call_function(torch._assert, (same, GUARD))
