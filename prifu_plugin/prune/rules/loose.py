"""Numbers among arguments that follow from sizes: what was seen of them need not hold elsewhere.

A crop to a multiple of four does nothing at 64 pixels, and nothing at 96: two runs that agree show
nothing about a third. So the operation is run with such a number changed, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from prifu_plugin.prune.nodes import SIZED
from prifu_plugin.prune.rules.base import Analysis
from prifu_plugin.prune.seen import seen


def loose_numbers(analysis: Analysis, node: fx.Node) -> list[fx.Node]:
    """Return the computed whole numbers that a node is given, if they follow from sizes that vary.

    Those that a view is given are not among them: its result has all elements, in their order.
    """
    if node.target in SIZED or node.target is torch.reshape:
        return []
    return [
        given
        for given in node.all_input_nodes
        if seen(given).moves and _numbers(analysis.values.get(given))
    ]


def changed(analysis: Analysis, loose: list[fx.Node]) -> Iterator[dict[fx.Node, Any]]:
    """Yield other values of numbers, one changed at a time: near it, half of it, and 1."""
    for node in loose:
        value = analysis.values[node]
        if isinstance(value, int):
            yield from ({node: other} for other in _others(value))
            continue
        for place, item in enumerate(value):
            for other in _others(item):
                yield {node: type(value)([*value[:place], other, *value[place + 1 :]])}


def _others(value: int) -> list[int]:
    """Return other values; what is cut at half of a number may be all there near the number."""
    return [value + 1, value - 1, *(other for other in (value // 2, 1) if value > other + 1)]


def _numbers(value: Any) -> bool:
    if type(value) in (tuple, list, torch.Size):
        return bool(value) and all(type(item) is int for item in value)
    return type(value) is int
