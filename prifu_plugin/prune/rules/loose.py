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
from prifu_plugin.prune.seen import seen, was_seen


def loose_numbers(analysis: Analysis, node: fx.Node) -> list[fx.Node]:
    """Return the computed whole numbers that a node is given, if they follow from sizes that vary.

    Those that a view is given are not among them: its result has all elements, in their order.
    """
    if node.target in SIZED or node.target is torch.reshape:
        return []
    known: dict[fx.Node, bool] = {}
    return [
        given
        for given in node.all_input_nodes
        if not seen(given).shape and _numbers(analysis.values.get(given)) and _varies(given, known)
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


def _varies(node: fx.Node, known: dict[fx.Node, bool]) -> bool:
    """Whether a value follows from a size that was not the same in both runs."""
    if node not in known:
        what = seen(node)
        differs = what.other_example is not None and what.example != what.other_example
        known[node] = differs or (
            not _asks_for_size(node)
            and any(
                was_seen(i) and not seen(i).shape and _varies(i, known)
                for i in node.all_input_nodes
            )
        )
    return known[node]


def _asks_for_size(node: fx.Node) -> bool:
    """Whether a node is a size itself: asked of a tensor, or one of its shape."""
    return any(
        bool(seen(source).shape) or isinstance(seen(source).example, torch.Size)
        for source in node.all_input_nodes
    )
