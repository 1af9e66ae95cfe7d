"""Guards: nodes by which a graph refuses inputs that it was not made for."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx

GUARD = (
    "This model was made for other input sizes: its forward decides on sizes, and for this input "
    "it would decide differently. Prune again with example_inputs= of this size."
)


def is_guard(node: fx.Node) -> bool:
    """Whether a node refuses inputs that a graph was not made for."""
    return node.target is torch._assert and bool(node.args[1:] == (GUARD,))


def fix_sizes(graph: fx.Graph, shapes: Sequence[tuple[int, ...]]) -> None:
    """Let a graph refuse inputs whose sizes differ from these in more than the batch."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_before(inputs[-1].next):
        for node, shape in zip(inputs, shapes, strict=True):
            for dim, size in enumerate(shape[1:], 1):
                asked = graph.call_method("size", (node, dim))
                same = graph.call_function(operator.eq, (asked, size))
                graph.call_function(torch._assert, (same, GUARD))


def drop_settled(graph: fx.Graph) -> None:
    """Erase guards of sizes that are the same in both runs, as those of channels are.

    Args:
        graph: with recorded examples of two runs; nodes that only guards read may be left.
    """
    for node in list(graph.nodes):
        if is_guard(node) and _is_settled(node.args[0]):
            graph.erase_node(node)


def _is_settled(value: object) -> bool:
    if not isinstance(value, fx.Node):
        return True
    sources = value.all_input_nodes
    asks = any(source.meta["shape"] or source.meta["nested"] for source in sources)
    picks = value.target is operator.getitem  # of all sizes, one
    if asks or picks or not sources:
        return "other" in value.meta and bool(value.meta["example"] == value.meta["other"][1])
    return all(_is_settled(source) for source in sources)
