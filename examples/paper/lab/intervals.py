"""Intervals of what claims are about: over test images and seeds, or over seeds alone."""

import math
import statistics
from collections.abc import Callable, Mapping

import torch
from scipy import stats

from prifu_plugin.audit.statistics import Interval

DRAWS = 1000
NORMAL = 1.96


def over_seeds_and_images(value: Callable[..., float], seeds: int, *images: int) -> Interval:
    """Return a value with a 95 % interval over defence seeds and test images.

    Student's interval over the seeds, as wide as two or three allow, and the bootstrap's normal
    one over the images, which all seeds share, added as independent errors.

    Args:
        value: takes indices of seeds, and one tensor of indices for each count of images.
        seeds: how many; of one, nothing is known.
        images: how many test images there are, by data set.
    """
    every, whole = torch.arange(seeds), tuple(map(torch.arange, images))
    mean, nothing = value(every, *whole), float("nan")
    if seeds < 2 or mean != mean:
        return Interval(mean, nothing, nothing)
    each = over_seeds({s: value(every[s : s + 1], *whole) for s in range(seeds)})
    chance = torch.Generator().manual_seed(0)
    draws = [
        value(every, *(torch.randint(n, (n,), generator=chance) for n in images))
        for _ in range(DRAWS)
    ]
    reach = math.hypot((each.high - each.low) / 2, NORMAL * statistics.stdev(draws))
    return Interval(mean, mean - reach, mean + reach)


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
