"""Find out by trial in which groups a normalization takes its statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prifu_plugin.graph.norms import num_channels
from prifu_plugin.prune.kernels import GROUPS, slice_norm


def independent_groups(module: nn.Module, dim: int, rank: int) -> int:
    """Return how many groups of neighbouring channels of a layer do not depend on each other.

    The number its attributes tell, or the number of channels, if two trials bear it out: other
    groups do not change when one does, and a layer made of some groups alone computes the same.

    Args:
        module: a normalization in fp64, with or without a filter, whose scale can be folded.
        dim: channel dimension.
        rank: of its input.

    Returns:
        The number of groups, 1 if they all depend on each other or it cannot be told.

    Example:
        >>> independent_groups(nn.GroupNorm(4, 8).double(), 1, 4)
        4
        >>> independent_groups(nn.LayerNorm(8).double(), -1, 3)
        1
    """
    channels = num_channels(module)
    if channels is None or dim != 1 or rank < 3:
        return 1
    told = [getattr(module, name, 0) for name in GROUPS]
    groups = next((number for number in told if isinstance(number, int) and number), channels)
    if groups <= 1 or channels % groups:
        return 1
    try:
        return groups if _holds(module, channels, groups, rank) else 1
    except Exception:  # noqa: BLE001 - a layer that refuses the trial is taken whole
        return 1


def _holds(module: Any, channels: int, groups: int, rank: int) -> bool:
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        shape = (2, channels, *[4] * (rank - 2))
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    x, other = draw(), draw()
    some = torch.arange(groups) % 2 == 0
    mine = some.repeat_interleave(channels // groups)
    kept = tuple(mine.nonzero().flatten().tolist())
    mixed = torch.where(mine.reshape(1, -1, *[1] * (rank - 2)), x, other)
    with torch.no_grad():
        whole = module(x)[:, mine]
        if not torch.allclose(module(mixed)[:, mine], whole, rtol=1e-12, atol=1e-12):
            return False
        alone, scale, _ = slice_norm(module, kept, True, int(some.sum()))
        folded = alone(x[:, mine])
    return torch.allclose(folded, whole, rtol=1e-10, atol=1e-10)
