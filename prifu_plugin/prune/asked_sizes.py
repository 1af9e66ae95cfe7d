"""Tensors that are computed for their sizes alone: the sizes are computed instead.

Of a branch that masks have closed, a forward may still ask how large it is: for a guard, or to give
something else its shape.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx, nn

from prifu_plugin.graph.norms import norm_spec
from prifu_plugin.prune.elementwise import POINTWISE, is_pointwise_module

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


def spare_asked(graph: fx.Graph, members: dict[str, Any]) -> None:
    """Ask the input of a layer for the sizes of its result, if nothing else is asked of that.

    Args:
        graph: changed in place.
        members: what it calls, by path.
    """
    for source in reversed(list(graph.nodes)):
        asked = list(source.users)
        if not asked or not all(map(_is_size, asked)) or len(source.all_input_nodes) != 1:
            continue
        layer = members.get(str(source.target)) if source.op == "call_module" else None
        x, dims = source.all_input_nodes[0], [node.args[1] for node in asked]
        if not all(_follows(source, layer, dim) for dim in dims):
            continue
        for node, dim in zip(asked, dims, strict=True):
            with graph.inserting_before(source):
                size = _size(graph, layer, graph.call_method("size", (x, dim)), dim)
            node.replace_all_uses_with(size)
            graph.erase_node(node)
        graph.erase_node(source)


def _is_size(node: fx.Node) -> bool:
    asks = node.op == "call_method" and node.target == "size" and len(node.args) == 2
    return asks and isinstance(node.args[1], int) and node.args[1] >= 0


def _follows(source: fx.Node, layer: Any, dim: Any) -> bool:
    """Whether a size of what an operation returns follows from the same size of what it takes."""
    if layer is None:
        return source.target in POINTWISE
    if is_pointwise_module(layer) or norm_spec(layer) is not None:
        return True
    if any(type(layer).forward is pool.forward for pool in _POOLS):
        return dim < 2 or not layer.ceil_mode
    convolution = any(type(layer).forward is kind.forward for kind in _CONVOLUTIONS)
    return convolution and dim != 1 and not isinstance(layer.padding, str)


def _size(graph: fx.Graph, layer: Any, size: fx.Node, dim: int) -> fx.Node:
    """Compute a size of what a layer returns."""
    if dim < 2 or not hasattr(layer, "kernel_size"):
        return size
    kernel, stride, padding, dilation = (
        _at(getattr(layer, name, 1), dim - 2)
        for name in ("kernel_size", "stride", "padding", "dilation")
    )
    reach = 2 * padding - dilation * (kernel - 1) - 1
    if (reach, stride) == (-1, 1):
        return size
    last = graph.call_function(operator.add, (size, reach))
    if stride > 1:
        last = graph.call_function(operator.floordiv, (last, stride))
    return graph.call_function(operator.add, (last, 1))


def _at(value: Any, place: int) -> int:
    return int(value[place] if isinstance(value, tuple | list) else value)
