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
    """Yield other values of numbers, one of them changed at a time: by one more, by one less."""
    for node in loose:
        value = analysis.values[node]
        for step in (1, -1):
            if isinstance(value, int):
                yield {node: value + step}
                continue
            for place in range(len(value)):
                items = [item + step * (at == place) for at, item in enumerate(value)]
                yield {node: type(value)(items)}


def _numbers(value: Any) -> bool:
    if type(value) in (tuple, list, torch.Size):
        return bool(value) and all(type(item) is int for item in value)
    return type(value) is int
