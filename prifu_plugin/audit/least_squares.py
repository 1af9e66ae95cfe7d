"""Linear maps by penalized least squares: attackers of labels and of images."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

PENALTIES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1)
"""Shares of the mean variance of the inputs."""


def least_squares(x: Tensor, target: Tensor) -> Iterator[Tensor]:
    """Yield weights (D + 1, K) for each of `PENALTIES`, the first row for a constant input.

    Args:
        x: (N, D).
        target: (N, K), fp64.

    Example:
        >>> x = torch.arange(4.0)[:, None]
        >>> next(least_squares(x, 2 * x.double() + 1)).flatten().round(decimals=3).tolist()
        [1.0, 2.0]
    """
    x = with_one(x)
    more = x.shape[1] > len(x)  # values than samples: the same weights, by the samples' products
    values, turn = torch.linalg.eigh(x @ x.T if more else x.T @ x)
    moment = turn.T @ (target if more else x.T @ target)
    mean = values.sum() / x.shape[1]
    for penalty in PENALTIES:
        weight = turn @ (moment / (values.clamp_min(0) + penalty * mean)[:, None])
        yield x.T @ weight if more else weight


def with_one(x: Tensor) -> Tensor:
    """Return x in fp64 with a constant input before it."""
    return torch.cat([torch.ones(len(x), 1, dtype=torch.float64), x.double()], 1)
