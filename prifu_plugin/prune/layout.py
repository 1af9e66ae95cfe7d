"""Which channels of a tensor exist in the pruned model, and how to get from one set to another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from prifu_plugin.prune.facts import Fact, channels_of

Layout = Mapping[int, tuple[int, ...]]
"""Channel dimension -> original indices, in physical order; an absent dimension is whole."""

FILL = -1
"""A position with no physical source; its value comes from the constants."""


@dataclass(frozen=True)
class Conform:
    """How an operand is brought to the layout its reader wants.

    Attributes:
        select: channel dimension -> positions in the operand, FILL where it has none.
        vector: name of the constant that is added at filled positions, "" if all are 0.
        constant: the operand does not exist; use this constant in its place.
    """

    select: tuple[tuple[int, tuple[int, ...]], ...] = ()
    vector: str = ""
    constant: str = ""

    @property
    def is_identity(self) -> bool:
        """Whether the operand is used as it is."""
        return not (self.select or self.vector or self.constant)


def physical(fact: Fact, layout: Layout, dim: int) -> tuple[int, ...]:
    """Return the original indices that exist along a dimension."""
    return layout[dim] if dim in layout else tuple(range(fact.shape[dim]))


def box(mask: Tensor, axes: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    """Return the smallest product of index sets that holds a mask over channels."""
    kept = {}
    for axis in axes:
        line = channels_of(mask, axis)
        kept[axis] = tuple(line.nonzero().flatten().tolist())
    return kept


def restrict(values: Tensor, layout: Layout) -> Tensor:
    """Restrict a tensor with summarized or whole dimensions to a layout."""
    for dim, indices in layout.items():
        if values.shape[dim] != 1:
            values = values.index_select(dim, torch.tensor(indices, dtype=torch.int64))
    return values


def simplify(fact_shape: tuple[int, ...], layout: Layout) -> dict[int, tuple[int, ...]]:
    """Drop the dimensions that are whole and in order."""
    return {d: i for d, i in layout.items() if i != tuple(range(fact_shape[d]))}
