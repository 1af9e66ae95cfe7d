"""Recognize data movement: an operation that commutes with every relabelling of values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from prifu_plugin.prune.facts import Fact
from prifu_plugin.prune.rules.base import Analysis, run


@dataclass(frozen=True)
class Moved:
    """Where the elements of one result came from: labels of the source, 0 for a padded zero."""

    labels: Tensor
    axes: tuple[int, ...]


def moved_labels(analysis: Analysis, node: fx.Node, source: fx.Node) -> tuple[Moved, ...]:
    """Run a node on labels and on relabelled values; return where everything came from.

    Args:
        analysis: the facts so far.
        node: the operation.
        source: the only tensor it reads.

    Returns:
        One entry for each result, none if the operation does anything but move.
    """
    fact = analysis.fact(source)
    size = math.prod(fact.shape)
    labels = torch.arange(1, size + 1, dtype=torch.float64).reshape(fact.shape)
    table = _table(size)
    try:
        moved = _tensors(_on(analysis, node, source, labels))
        again = _tensors(_on(analysis, node, source, table[labels.long()]))
    except Exception:  # noqa: BLE001 - an operation that refuses labels is no movement
        return ()
    if not moved or any(not _are_labels(m, size) for m in moved):
        return ()
    if any(not torch.equal(a, table[m.long()]) for m, a in zip(moved, again, strict=True)):
        return ()
    return tuple(_with_axes(m.long(), fact) for m in moved)


_TABLES = [torch.zeros(1, dtype=torch.float64)]


def _table(size: int) -> Tensor:
    """Return a random signed value for each label, 0 for label 0; drawn once, for speed."""
    if len(_TABLES[0]) <= size:
        generator = torch.Generator().manual_seed(1)
        _TABLES[0] = torch.randn(2 * size + 1, dtype=torch.float64, generator=generator)
        _TABLES[0][0] = 0.0
    return _TABLES[0][: size + 1]


def _on(analysis: Analysis, node: fx.Node, source: fx.Node, value: Tensor) -> Any:
    return run(analysis, node, lambda n: value if n is source else analysis.values[n])


def _tensors(result: Any) -> list[Tensor]:
    items = result if isinstance(result, tuple | list) else [result]
    if not all(isinstance(i, Tensor) and i.dtype == torch.float64 for i in items):
        return []
    return [item.clone() for item in items]


def _are_labels(values: Tensor, size: int) -> bool:
    whole = torch.isfinite(values) & (values == values.round()) & (values >= 0) & (values <= size)
    return values.ndim > 0 and values.numel() > 0 and bool(whole.all())


def _with_axes(labels: Tensor, fact: Fact) -> Moved:
    """Find the dimensions of the result along which a channel index of the source varies."""
    axes = set()
    for axis in fact.axes:
        index = (labels - 1).clamp_min(0) // math.prod(fact.shape[axis + 1 :]) % fact.shape[axis]
        for dim in range(labels.ndim):
            if labels.shape[dim] > 1 and bool((index != index.narrow(dim, 0, 1)).any()):
                axes.add(dim)
    return Moved(labels, tuple(sorted(axes)))
