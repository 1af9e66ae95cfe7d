"""What the labels of moved elements tell: along which dimensions channels lie, and which ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prifu_plugin.filter import along


def axes_of(index: Tensor, padded: Tensor) -> set[int]:
    """Find the dimensions of the result along which a channel index of the source varies.

    Zeros that were padded have no channel: how many there are depends on the size of the input.
    """
    index = index.int()  # of 64 bits, the least along a dimension takes ten times as long
    lowest = index.masked_fill(padded, torch.iinfo(index.dtype).max)
    highest = index.masked_fill(padded, -1)
    return {
        dim
        for dim in range(index.ndim)
        if index.shape[dim] > 1 and bool((highest.amax(dim) > lowest.amin(dim)).any())
    }


def channel_of(labels: Tensor, shape: tuple[int, ...], axis: int) -> Tensor:
    """Return the index along a dimension of the source that each label has."""
    return (labels - 1).clamp_min(0) // math.prod(shape[axis + 1 :]) % shape[axis]


def relation_of(
    labels: Tensor, indices: list[Tensor], sizes: list[int], axes: tuple[int, ...]
) -> Tensor:
    """Return which channels of the source each channel of the result reads, as sorted pairs.

    All that the analysis concludes of a movement follows from it.
    """
    origin = torch.zeros_like(labels, dtype=torch.int64)
    for index, size in zip(indices, sizes, strict=True):
        origin = origin * size + index
    count = math.prod(sizes)
    origin = torch.where(labels == 0, count, origin)
    place = torch.zeros([1] * labels.ndim, dtype=torch.int64)
    for axis in axes:
        line = torch.arange(labels.shape[axis])
        shaped = along(line, labels.ndim, axis)
        place = place * labels.shape[axis] + shaped
    return _sorted_values(place * (count + 1) + origin, (count + 1) * _product(labels, axes))


def _product(labels: Tensor, axes: tuple[int, ...]) -> int:
    return math.prod(labels.shape[axis] for axis in axes)


def _sorted_values(numbers: Tensor, end: int) -> Tensor:
    """Return the different values of integers below an end; without sorting where that is dear."""
    if end > 4 * numbers.numel():
        values: Tensor = torch.unique(numbers)
        return values
    seen = torch.zeros(end, dtype=torch.bool)
    seen[numbers.flatten()] = True
    return seen.nonzero().flatten()
