"""From scores to figures: accuracies, bits, floors, and their intervals. Knows no attacks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prifu_plugin.ranks import ranks

RESAMPLES = 1000
FEWER_RESAMPLES = 200
"""For what takes longer."""
FEWEST = 50
"""Test items below which no interval is given."""


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % bootstrap interval over test items; NaN bounds if too few."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.value:.3f}"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Metrics:
    """How well scores name the private class.

    Attributes:
        accuracy: with its interval.
        balanced: mean recall over the classes.
        auc: area under the ROC curve, mean over one class against the rest, with its interval.
        bits: H(S) - CE(S | z), what the attacker learned of the class; may be below 0.
    """

    accuracy: Interval
    balanced: float
    auc: Interval
    bits: float


def metrics(
    scores: Tensor,
    labels: Tensor,
    seed: int = 0,
    *,
    probable: Tensor | None = None,
    groups: Tensor | None = None,
) -> Metrics:
    """Turn log-probabilities into figures.

    Args:
        scores: log-probabilities (N, K).
        labels: true classes (N,).
        seed: of the bootstrap.
        probable: the same after `calibrated`, for the bits; by default the scores themselves.
        groups: of which `bootstrap` draws.

    Example:
        >>> perfect = torch.eye(2).repeat(50, 1).add(1e-9).log()
        >>> found = metrics(perfect, torch.arange(100) % 2)
        >>> found.accuracy.value, found.auc.value, round(found.bits, 6)
        (1.0, 1.0, 1.0)
    """
    right = (scores.argmax(1) == labels).double()
    return Metrics(
        mean_interval(right, seed, groups=groups),
        _balanced(right, labels),
        bootstrap(
            lambda index: area(scores[index], labels[index]),
            len(labels),
            seed,
            FEWER_RESAMPLES,
            groups=groups,
        ),
        _bits(scores if probable is None else probable, labels),
    )


def calibrated(scores: Tensor, known: Tensor, labels: Tensor, prior: Tensor) -> Tensor:
    """Return log-probabilities that say no more than validation data bear out.

    A temperature and a share of the prior are chosen by cross-entropy on validation data: an
    attacker that is right but too sure of itself has learned bits nevertheless.

    Args:
        scores: log-probabilities on test data (N, K).
        known: the same on validation data (M, K).
        labels: classes of validation data (M,).
        prior: share of each class (K,), above 0.

    Example:
        >>> sure = torch.tensor([[0.0, -50.0]]).repeat(10, 1)  # right 9 times of 10
        >>> y = torch.tensor([0] * 9 + [1])
        >>> found = calibrated(sure, sure, y, torch.tensor([0.5, 0.5])).exp()[0]
        >>> 0.8 < float(found[0]) < 0.95
        True
    """
    best: tuple[float, float, float] = (math.inf, 1.0, 0.0)
    for temperature in (0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0):
        for share in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
            mixed = _mixed(known, prior, temperature, share)
            loss = -float(mixed.gather(1, labels[:, None]).mean())
            best = min(best, (loss, temperature, share))
    return _mixed(scores, prior, *best[1:])


def _mixed(scores: Tensor, prior: Tensor, temperature: float, share: float) -> Tensor:
    told = (scores.double() / temperature).softmax(1)
    return ((1 - share) * told + share * prior.double()).clamp_min(1e-12).log()


def bootstrap(
    statistic: Callable[[Tensor], float],
    count: int,
    seed: int = 0,
    resamples: int = RESAMPLES,
    *,
    groups: Tensor | None = None,
) -> Interval:
    """Return a statistic of all items and the 2.5 and 97.5 percentiles over resamples.

    Args:
        statistic: indices of items -> number.
        count: of items.
        seed: of the resampling.
        resamples: how many.
        groups: of items that are no independent draws, (count,), such as images of one person:
            whole groups are drawn, and items of themselves otherwise.
    """
    value = statistic(torch.arange(count))
    members = None if groups is None else _members(groups)
    units = count if members is None else len(members)
    if units < FEWEST:
        return Interval(value, float("nan"), float("nan"))
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(resamples):
        chosen = torch.randint(units, (units,), generator=generator)
        if members is not None:
            chosen = torch.cat([members[i] for i in chosen.tolist()])
        drawn.append(statistic(chosen))
    return _interval(value, torch.tensor(drawn, dtype=torch.float64))


def mean_interval(
    values: Tensor, seed: int = 0, resamples: int = RESAMPLES, *, groups: Tensor | None = None
) -> Interval:
    """Return what `bootstrap` finds for the mean of values (N,), much faster.

    Example:
        >>> right = (torch.arange(100) < 80).double()
        >>> print(mean_interval(right))
        0.800 [0.720, 0.880]
    """
    means = _means(values.unsqueeze(1), seed, groups, resamples)
    return _interval(float(values.double().mean()), means[:, 0])


def _means(values: Tensor, seed: int, groups: Tensor | None, resamples: int = RESAMPLES) -> Tensor:
    """Return the means (resamples, K) of values (N, K): of the resamples `bootstrap` draws."""
    sums = torch.cat([values, torch.ones_like(values[:, :1])], 1).double()
    if groups is not None:
        place = groups.unique(return_inverse=True)[1]
        sums = sums.new_zeros(int(place.max()) + 1, sums.shape[1]).index_add(0, place, sums)
    if len(sums) < FEWEST:
        return torch.empty(0, values.shape[1], dtype=torch.float64)
    parts = (drawn.double() @ sums for drawn in _drawn(len(sums), seed, resamples).split(100))
    totals = torch.cat(list(parts))
    return totals[:, :-1] / totals[:, -1:]


@functools.lru_cache(maxsize=2)
def _drawn(units: int, seed: int, resamples: int) -> Tensor:
    """Return how often each resample draws each unit, (resamples, units)."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros(resamples, units)
    for one in counts:  # row by row: indices of all resamples at once would take 8 times as much
        one.copy_(torch.randint(units, (units,), generator=generator).bincount(minlength=units))
    return counts


def _interval(value: float, draws: Tensor) -> Interval:
    known = draws[~draws.isnan()]  # a few resamples may lack a class of few items
    if not len(known) or len(known) < ENOUGH * len(draws):
        return Interval(value, float("nan"), float("nan"))
    low, high = known.quantile(torch.tensor([0.025, 0.975]).double())
    return Interval(value, float(low), float(high))


def _members(groups: Tensor) -> list[Tensor]:
    """Return the places of each group."""
    order = groups.argsort(stable=True)
    return list(order.split(groups.unique(return_counts=True)[1].tolist()))


ENOUGH = 0.9
"""Share of resamples for which a statistic must exist, for an interval of it."""


def above_by_auc(auc: Interval, task_auc: float) -> bool:
    """Whether scores order the items better than chance and the task's own answer do."""
    return auc.low > max(0.5, task_auc) + 0.01


def leak(
    attacked: Tensor,
    plain: Tensor,
    floor: Tensor,
    seed: int = 0,
    *,
    groups: Tensor | None = None,
) -> Interval | None:
    """Return (attack - floor) / (attack on the plain model - floor): 0 is the floor, 1 is plain.

    Args:
        attacked: whether the attack was right, by test item, (N,) of 0 and 1, or means over seeds.
        plain: the same of the undefended model, on the same items.
        floor: the same of the floor's guess.
        seed: of the bootstrap, which resamples the items of all three together.
        groups: of which it draws.

    Returns:
        None where the undefended model is not clearly above the floor: there is nothing to share.
        Nor is that clear of fewer than `FEWEST` items, or groups.
    """
    gained, above = attacked - floor, plain - floor
    drawn_gain, drawn_above = _means(torch.stack([gained, above], 1), seed, groups).unbind(1)
    known = _interval(float(above.double().mean()), drawn_above)
    if not known.low > 0:
        return None
    # Where a resample has nothing to share, the interval must become wide, not vanish.
    draws = drawn_gain / drawn_above.clamp_min(1e-9)
    return _interval(float(gained.mean()) / max(known.value, 1e-9), draws)


def leaks(attacked: tuple[float, ...], plain: float, floor: float) -> tuple[float, ...]:
    """Return `leak` of the accuracies of several attacks, one for each.

    Example:
        >>> leaks((0.6, 0.7), plain=0.9, floor=0.5)
        (0.25, 0.5)
    """
    return tuple(round((one - floor) / max(plain - floor, 1e-9), 12) for one in attacked)


def majority_guess(train: Tensor, test: Tensor) -> Tensor:
    """Return whether the most frequent training class is right, by test item."""
    return (test == train.bincount().argmax()).double()


def task_guess(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> Tensor:
    """Return whether the best guess from the task's own answer is right, by test item.

    Args:
        train: task answer (N,) and private class (N,).
        test: the same of test data.

    Example:
        >>> odd, digit = torch.tensor([0, 0, 1, 1]), torch.tensor([2, 2, 3, 5])
        >>> task_guess((odd, digit), (odd, digit)).mean().item()
        0.75
    """
    answer, private = train
    table = torch.zeros(int(max(answer.max(), test[0].max())) + 1, int(private.max()) + 1)
    table.index_put_((answer, private), torch.ones(len(answer)), accumulate=True)
    table += 1e-3 * private.bincount(minlength=table.shape[1])  # for answers never seen
    return (table.argmax(1)[test[0]] == test[1]).double()


def task_scores(train: tuple[Tensor, Tensor], answers: Tensor) -> Tensor:
    """Return log-probabilities of the private classes given the task's answer alone, (N, K)."""
    answer, private = train
    table = torch.full((int(max(answer.max(), answers.max())) + 1, int(private.max()) + 1), 1e-3)
    table.index_put_((answer, private), torch.ones(len(answer)), accumulate=True)
    return (table / table.sum(1, keepdim=True)).log()[answers]


def half_width(share: float, count: int) -> float:
    """Return half of the 95 % interval of a share, by the normal approximation."""
    return 1.96 * math.sqrt(max(share * (1 - share), 1 / count) / count)


def _balanced(right: Tensor, labels: Tensor) -> float:
    return float(torch.stack([right[labels == c].mean() for c in labels.unique()]).mean())


def area(scores: Tensor, labels: Tensor) -> float:
    """Return the area under the ROC curve, mean over one class against the rest."""
    found = []
    for c in labels.unique().tolist():
        mine = labels == c
        if mine.all():
            return float("nan")
        place = ranks(scores[:, c])
        count = int(mine.sum())
        above = float(place[mine].sum()) - count * (count - 1) / 2
        found.append(above / (count * (len(labels) - count)))
    return sum(found) / len(found)


def _bits(scores: Tensor, labels: Tensor) -> float:
    prior = labels.bincount().double() / len(labels)
    entropy = -float((prior[prior > 0] * prior[prior > 0].log2()).sum())
    surprise = -float(scores.double().gather(1, labels[:, None]).mean()) / math.log(2)
    return entropy - surprise
