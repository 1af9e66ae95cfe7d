"""Read off labels what a movement does to channels."""

from __future__ import annotations

import math
import operator

import torch
from torch import Tensor, fx

from prifu_plugin.filter import along
from prifu_plugin.prune.facts import Fact
from prifu_plugin.prune.layout import FILL
from prifu_plugin.prune.nodes import first_input
from prifu_plugin.prune.rules.base import Analysis


def selection(labels: Tensor, shape: tuple[int, ...], dim: int) -> list[int] | None:
    """Return m with result[.., c, ..] = source[.., m[c], ..], or None; FILL for zeros."""
    if any(labels.shape[d] != size for d, size in enumerate(shape) if d != dim):
        return None
    source = torch.arange(1, math.prod(shape) + 1).reshape(shape)
    stride = math.prod(shape[dim + 1 :])
    line = labels.movedim(dim, 0).reshape(labels.shape[dim], -1)[:, 0]
    mapping = torch.where(line > 0, (line - 1) // stride % shape[dim], FILL)
    expected = source.index_select(dim, mapping.clamp_min(0))
    zero = along(mapping == FILL, len(shape), dim)
    if not torch.equal(torch.where(zero, 0, expected), labels):
        return None
    return [int(i) for i in mapping]


def order(
    result: Tensor, labels: Tensor, sets: dict[int, tuple[int, ...]]
) -> dict[int, tuple[int, ...]] | None:
    """Read off the order in which the kept indices come out of the operation."""
    positions = torch.full((int(labels.max()) + 1,), -1, dtype=torch.int64)
    positions[labels.flatten()] = torch.arange(labels.numel())
    layout = {}
    for axis, kept in sets.items():
        if result.shape[axis] != len(kept):
            return None
        line = result.movedim(axis, 0).reshape(result.shape[axis], -1).amax(1)
        flat = positions[line.clamp_max(len(positions) - 1)]
        index = flat // math.prod(labels.shape[axis + 1 :]) % labels.shape[axis]
        layout[axis] = tuple(index.tolist())
        if sorted(layout[axis]) != sorted(kept):
            return None
    return layout


def fixed_crop(analysis: Analysis, chain: list[fx.Node]) -> bool:
    """Whether a chain crops to literal bounds, which may do nothing at the sizes that were run."""
    for node in chain:
        if _cuts_a_length(analysis, node):
            return True
        index = node.args[1] if node.target is operator.getitem else ()
        value = analysis.values[first_input(node)]
        if not isinstance(value, Fact):
            continue
        # None makes a dimension and takes none.
        parts = [p for p in (index if isinstance(index, tuple) else (index,)) if p is not None]
        if Ellipsis in parts:
            gap = parts.index(Ellipsis)
            wanted = len(value.shape) - len(parts) + 1
            parts[gap : gap + 1] = [slice(None)] * wanted
        for dim, part in enumerate(parts):
            if isinstance(part, slice) and _is_literal(part) and dim not in value.axes:
                return True
    return False


_CUTTING = {"split": 2, "tensor_split": 2, "split_with_sizes": 2, "narrow": 1}
"""Operations that cut at literal places, and where among their arguments the dimension stands."""


def _cuts_a_length(analysis: Analysis, node: fx.Node) -> bool:
    place = _CUTTING.get(str(getattr(node.target, "__name__", node.target)))
    value = analysis.values.get(first_input(node))
    if place is None or not isinstance(value, Fact):
        return False
    dim = node.kwargs.get("dim", node.args[place] if len(node.args) > place else 0)
    return not isinstance(dim, int) or dim % len(value.shape) not in value.axes


def _is_literal(part: slice) -> bool:
    return isinstance(part.stop, int) or (isinstance(part.start, int) and part.start < 0)
