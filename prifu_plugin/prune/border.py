"""What missing constants contribute to a zero-padded convolution, at any resolution.

Away from the border the contribution is one number per channel; at the border some taps fall on
padding. The map is computed on a field of ones just large enough to have both borders and one
interior row and column, which are then repeated to the size of the result.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn


def border_map(
    graph: fx.Graph, layer: nn.Conv2d, x: fx.Node, result: fx.Node, weight: fx.Node
) -> Any:
    """Emit the nodes of a border map.

    Args:
        graph: where they go.
        layer: the convolution: its kernel size, stride, padding and dilation.
        x: its input, (N, C, H, W).
        result: its result, (N, O, H', W').
        weight: kernel from one channel of ones to the contribution, (O, 1, kh, kw).

    Returns:
        The map, (1, O, H', W').
    """
    stride, padding, dilation = _pair(layer.stride), _pair(layer.padding), _pair(layer.dilation)
    device = graph.call_function(getattr, (weight, "device"))
    firsts = [-(-padding[i] // stride[i]) for i in (0, 1)]
    field = []
    for i in (0, 1):
        least = firsts[i] * stride[i] - padding[i] + (layer.kernel_size[i] - 1) * dilation[i] + 1
        given = graph.call_method("size", (x, i + 2))
        # The least size with the same remainder, so that the far border falls alike.
        rest = graph.call_function(operator.mod, (_minus(graph, given, least), stride[i]))
        grown = graph.call_function(operator.add, (rest, least))
        field.append(_inside(graph, grown, given, i, weight, device))
    ones = graph.call_function(torch.mul, tuple(field))
    small = graph.call_function(F.conv2d, (ones, weight, None, stride, padding, dilation))
    for i in (0, 1):
        small = _repeat(graph, small, result, i + 2, firsts[i], device)
    return small


def _inside(
    graph: fx.Graph, grown: fx.Node, given: fx.Node, i: int, weight: fx.Node, device: fx.Node
) -> fx.Node:
    """Mark what is inside the input with ones; behind the end of a small one there is padding.

    Exporters keep this for every size, where a minimum of two sizes is known to some of them only.
    """
    places = graph.call_function(torch.arange, (grown,), {"device": device})
    inside = graph.call_method("type_as", (graph.call_function(torch.lt, (places, given)), weight))
    return graph.call_method("reshape", (inside, (1, 1, -1, 1) if i == 0 else (1, 1, 1, -1)))


def _repeat(
    graph: fx.Graph, small: fx.Node, result: fx.Node, dim: int, at: int, device: fx.Node
) -> fx.Node:
    """Repeat one interior row until the map is as large as the result, or take its beginning."""
    have, want = (graph.call_method("size", (node, dim)) for node in (small, result))
    places = graph.call_function(torch.arange, (want,), {"device": device})
    near = graph.call_method("clamp", (places,), {"max": at})
    far = _minus(graph, places, _minus(graph, want, have))
    repeated = graph.call_function(torch.maximum, (near, far))
    index = graph.call_function(torch.minimum, (places, repeated))
    return graph.call_function(torch.index_select, (small, dim, index))


def _minus(graph: fx.Graph, left: Any, right: Any) -> fx.Node:
    return graph.call_function(operator.sub, (left, right))


def _pair(value: Any) -> tuple[int, int]:
    return tuple(value) if isinstance(value, tuple | list) else (value, value)
