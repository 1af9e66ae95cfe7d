"""Intervals of what claims are about: over test images and seeds, or over seeds alone."""

import statistics
from collections.abc import Callable, Mapping

import torch
from scipy import stats
from torch import Tensor

from prifu_plugin.audit.statistics import Interval

DRAWS = 1000


def bootstrap(value: Callable[..., float], *counts: int) -> Interval:
    """Return a value with its 95 % interval over draws with replacement.

    Args:
        value: takes one tensor of indices for each count.
        counts: how many test images, or seeds, there are to draw from.
    """
    chance = torch.Generator().manual_seed(0)
    draws = [
        value(*(torch.randint(n, (n,), generator=chance) for n in counts)) for _ in range(DRAWS)
    ]
    low, high = torch.tensor(draws).double().quantile(torch.tensor([0.025, 0.975]).double())
    return Interval(value(*map(torch.arange, counts)), float(low), float(high))


def over_seeds(values: Mapping[int, float], less: Mapping[int, float] | None = None) -> Interval:
    """Return the mean over seeds with Student's 95 % interval, as wide as two or three allow.

    Args:
        values: by defence seed.
        less: likewise; the difference to the same seed is meant, for the seeds that both have.
    """
    found = [
        value - (less[seed] if less is not None else 0.0)
        for seed, value in values.items()
        if less is None or seed in less
    ]
    if len(found) < 2:
        nothing = float("nan")
        return Interval(found[0] if found else nothing, nothing, nothing)
    mean, error = statistics.mean(found), statistics.stdev(found) / len(found) ** 0.5
    reach = error * float(stats.t.ppf(0.975, len(found) - 1))
    return Interval(mean, mean - reach, mean + reach)


def percent(values: Mapping[int, float]) -> dict[int, float]:
    """Return shares by seed in percent."""
    return {seed: 100 * value for seed, value in values.items()}


def difference_of_accuracies(a: Tensor, b: Tensor) -> Interval:
    """Return how much more often attack a is right than b, percent points.

    Args:
        a: whether it is right, by seed and test image, (S, N).
        b: likewise, on the same images, (T, N).
    """

    def more(images: Tensor, ours: Tensor, theirs: Tensor) -> float:
        return 100 * float(a[ours][:, images].mean() - b[theirs][:, images].mean())

    return bootstrap(more, a.shape[1], len(a), len(b))
