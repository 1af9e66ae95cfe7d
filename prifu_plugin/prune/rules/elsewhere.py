"""What a movement does at sizes that no run has: beyond each number in its arguments, and odd ones.

A crop to 99 places, a band of 100, windows of 4: at the sizes of the runs they may do nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from prifu_plugin.prune.rules.base import Analysis, run
from prifu_plugin.prune.seen import seen

MOST = 2**22
"""Elements beyond which other sizes are not tried."""


@dataclass(frozen=True)
class Signature:
    """What a movement does to elements, channels aside.

    Attributes:
        plain: all are there, in their order.
        padded: there are zeros beside them.
    """

    plain: bool
    padded: bool


def elsewhere(
    analysis: Analysis, node: fx.Node, source: fx.Node, axes: tuple[int, ...]
) -> list[Signature] | None:
    """Run a movement on labels of other sizes, but for those of channels.

    Args:
        analysis: the facts so far.
        node: the operation, given the source and literal arguments alone.
        source: the tensor that is moved.
        axes: its channel dimensions.

    Returns:
        The signature of each result; none at all where such sizes are too large to be tried; None
        where the operation does not take them, or is given numbers of the graph.
    """
    if node.op == "call_module" or len(node.all_input_nodes) > 1:
        return None
    least = 5 + max(map(abs, _numbers(node)), default=0)
    shape = list(seen(source).shape)
    free = [dim for dim in range(len(shape)) if dim not in axes]
    for dim, more in zip(free, (0, 2, 6, 8, 12), strict=False):
        shape[dim] = least + more
    for dim in free[:-2]:  # what has literal numbers has them along the last ones
        shape[dim] = 2 if math.prod(shape) > MOST else shape[dim]
    if math.prod(shape) <= MOST:
        return _at(analysis, node, shape)
    return _one_by_one(analysis, node, shape, free)


def _one_by_one(
    analysis: Analysis, node: fx.Node, shape: list[int], free: list[int]
) -> list[Signature]:
    """Enlarge one dimension at a time; nothing is known if that is too much, or refused."""
    found: list[list[Signature]] = []
    for large in free:
        one = [2 + dim if dim in free and dim != large else n for dim, n in enumerate(shape)]
        there = _at(analysis, node, one) if math.prod(one) <= MOST else None
        if there is None:
            return []
        found.append(there)
    if not found or len({len(there) for there in found}) != 1:
        return []
    return [
        Signature(all(s.plain for s in each), any(s.padded for s in each))
        for each in zip(*found, strict=True)
    ]


def _at(analysis: Analysis, node: fx.Node, shape: list[int]) -> list[Signature] | None:
    labels = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64).reshape(shape)
    try:
        result: Any = run(analysis, node, lambda _: labels)
    except Exception:  # noqa: BLE001 - it takes no such size
        return None
    results = result if isinstance(result, tuple | list) else [result]
    if not all(isinstance(one, Tensor) and one.numel() for one in results):
        return None
    return [signature(one, labels.numel()) for one in results]


def signature(labels: Tensor, count: int) -> Signature:
    """Return what a movement does to `count` labels."""
    flat = labels.flatten().long()
    plain = len(flat) == count and torch.equal(flat, torch.arange(1, count + 1))
    return Signature(plain, bool((flat == 0).any()))


def _numbers(node: fx.Node) -> list[int]:
    found: list[Any] = []
    fx.node.map_aggregate((node.args, node.kwargs), found.append)
    return [number for number in found if type(number) is int and abs(number) < MOST]
