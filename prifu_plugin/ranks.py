"""Spearman's rank correlation, without scipy in the core."""

from __future__ import annotations

import torch
from torch import Tensor


def ranks(values: Tensor) -> Tensor:
    """Return the rank of each value from 0; equal values share the mean of theirs.

    Example:
        >>> import torch
        >>> ranks(torch.tensor([5.0, 1.0, 5.0])).tolist()
        [1.5, 0.0, 1.5]
    """
    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double() - 1
    shared: Tensor = (last - (counts - 1) / 2)[place]
    return shared


def spearman(x: Tensor, y: Tensor) -> float:
    """Return the rank correlation of two vectors; NaN if one of them is constant.

    Example:
        >>> import torch
        >>> spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 4.0, 9.0]))
        1.0
    """
    a, b = ranks(x), ranks(y)
    a, b = a - a.mean(), b - b.mean()
    norm = (a.square().sum() * b.square().sum()).sqrt()
    return round(float((a * b).sum() / norm), 12) if norm > 0 else float("nan")
