"""Choose alpha after training: stronger filters without training again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prifu_plugin.arguments import check_callable, number, whole_number
from prifu_plugin.batches import check_repeatable, pairs
from prifu_plugin.device import device_of, seeded
from prifu_plugin.errors import ConfigError, PrifuWarning
from prifu_plugin.graph.insert import filters
from prifu_plugin.graph.state import wrap_state
from prifu_plugin.graph.undisturbed import undisturbed
from prifu_plugin.graph.values import check_present
from prifu_plugin.learned import are_right, check_logits, is_above_chance
from prifu_plugin.sharded import check_unsharded

Data = Sequence[tuple[Tensor, Tensor]]
Metric = Callable[[Tensor, Tensor], Tensor]
"""Outputs and targets -> one number a sample, larger is better."""


@dataclass(frozen=True)
class Threshold:
    """What a model does at one threshold.

    Attributes:
        alpha: of all filters.
        score: mean of the metric over the data.
        open_share: share of all channels that are open.
        macs_share: multiply-accumulates after pruning over those before, None if not asked.
    """

    alpha: float
    score: float
    open_share: float
    macs_share: float | None = None


def sweep(
    model: nn.Module,
    data: Data,
    alphas: Sequence[float],
    *,
    metric: Metric | None = None,
    macs: bool = False,
) -> list[Threshold]:
    """Evaluate a trained, wrapped model at several thresholds, without training again.

    Args:
        model: a wrapped model; it is not changed.
        data: batches (x, target) that were not trained on; it is read once for each alpha.
        alphas: thresholds in [0, 1).
        metric: one number a sample; whether the class is right by default.
        macs: also prune at each threshold and count multiply-accumulates.

    Returns:
        One `Threshold` for each alpha, measured with the same noise.

    Raises:
        OrderError: if the model is not wrapped, or sharded over processes.
        ConfigError: for an alpha out of range, no data, or a metric that is not one number a
            sample.

    Example:
        >>> import prifu_plugin as prifu
        >>> net = prifu.wrap(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
        >>> data = [(torch.randn(8, 4), torch.randint(3, (8,)))]
        >>> [round(found.open_share, 2) for found in sweep(net, data, [0.0, 0.5])]
        [1.0, 1.0]
    """
    wrap_state(model)
    check_present(model)
    check_unsharded(model, "sweep")
    check_repeatable(data)
    check_callable("metric", metric, "outputs and targets, one number a sample")
    if not isinstance(alphas, Iterable) or isinstance(alphas, str):
        raise ConfigError(f"alphas={alphas!r}: pass a list of thresholds in [0, 1).")
    alphas = [number("alphas", alpha) for alpha in alphas]
    wrong = [a for a in alphas if not 0 <= a < 1]
    if wrong or not alphas:
        raise ConfigError(f"alphas={alphas}: pass at least one threshold, all in [0, 1).")
    _warn_of_closed(model, min(alphas))
    return _measure(model, data, alphas, metric, macs)


def _measure(
    model: nn.Module, data: Data, alphas: Sequence[float], metric: Metric | None, macs: bool
) -> list[Threshold]:
    for unit in filters(model).values():
        unit.check_finite()
    found = []
    for alpha in tqdm(alphas, desc="thresholds", leave=False, disable=None):
        with _at(model, alpha):
            found.append(_evaluate(model, data, alpha, metric or are_right, macs))
    return found


def _warn_of_closed(model: nn.Module, least: float) -> None:
    """Warn where a threshold is below one that training has filtered at."""
    units = filters(model).values()
    trained = [unit.alpha for unit in units if bool(unit.filtered.any())]
    if trained and least < max(trained):
        warnings.warn(
            f"Training has filtered at alpha={max(trained):g}, and what was filtered stays closed: "
            "thresholds below that open nothing. Train with a lower alpha to see more channels.",
            PrifuWarning,
            stacklevel=3,
        )


def fit_alpha(
    model: nn.Module,
    data: Data,
    *,
    max_drop: float | None = None,
    keep: float | None = None,
    macs: float | None = None,
    metric: Metric | None = None,
    steps: int = 12,
) -> Threshold:
    """Set alpha to the strongest threshold whose metric still holds, or the weakest that is small.

    Never below the present one: with `max_drop` the strongest whose metric falls by no more, with
    `keep` or `macs` the weakest that keeps no more.

    Args:
        model: a wrapped, trained model; its filters' alpha is set.
        data: batches (x, target) that were not trained on.
        max_drop: how far the mean metric may fall below that at the present alpha.
        keep: share of channels to keep at most.
        macs: share of multiply-accumulates to keep at most, after pruning.
        metric: one number a sample; whether the class is right by default.
        steps: of the search; each reads the data once.

    Returns:
        What was found.

    Raises:
        OrderError: if the model is not wrapped, or sharded over processes.
        ConfigError: unless exactly one budget is given, or if it cannot be met.
    """
    _check_budget(max_drop, keep, macs, steps)
    if metric is None and max_drop is not None and max_drop >= 1:
        raise ConfigError(
            f"max_drop={max_drop!r} of the accuracy, which is a share, allows anything: pass 0.02 "
            "for two percent."
        )
    wrap_state(model)
    check_present(model)
    check_unsharded(model, "fit_alpha")
    check_repeatable(data)
    check_callable("metric", metric, "outputs and targets, one number a sample")
    present = max(unit.alpha for unit in filters(model).values())
    sized = macs is not None
    reference = _evaluate(model, data, present, metric or are_right, sized)  # as it is
    _warn_at_chance(reference, data, metric)
    if max_drop is not None:
        least = reference.score - max_drop
        best = _bisect(
            lambda alpha: _measure(model, data, [alpha], metric, False)[0],
            lambda found: found.score >= least,
            (present, 1.0),
            steps,
            strongest=True,
        )
        if best is None:  # nothing stronger fits
            return reference
    else:
        share = "open_share" if keep is not None else "macs_share"
        most = keep if keep is not None else macs
        if getattr(reference, share) <= most:
            return reference
        best = _bisect(
            lambda alpha: _measure(model, data, [alpha], metric, sized)[0],
            lambda found: getattr(found, share) <= most,
            (present, 1.0),
            steps,
            strongest=False,
        )
    if best is None:
        most = present + (1 - present) * (1 - 0.5**steps)
        raise ConfigError(
            f"None of {steps} thresholds up to {most:.3g} meets the budget: pass more steps=, or "
            "train with a larger dose."
        )
    for unit in filters(model).values():
        unit.alpha = best.alpha
    return best


def _bisect(
    measure: Callable[[float], Threshold],
    fits: Callable[[Threshold], bool],
    between: tuple[float, float],
    steps: int,
    *,
    strongest: bool,
) -> Threshold | None:
    """Return the strongest or weakest threshold that fits; accuracy and sizes fall with alpha."""
    low, high = between
    best: Threshold | None = None
    for _ in range(steps):
        middle = (low + high) / 2
        found = measure(middle)
        fit = fits(found)
        if fit and (best is None or (found.alpha > best.alpha) == strongest):
            best = found
        low, high = (middle, high) if fit == strongest else (low, middle)
    return best


def _warn_at_chance(found: Threshold, data: Data, metric: Metric | None) -> None:
    if metric is None and not is_above_chance(found.score, torch.cat([y for _, y in data])):
        warnings.warn(
            f"At the present alpha {found.alpha:g} the model is right in {100 * found.score:.1f} % "
            "of cases, no more than by chance: train before choosing a threshold.",
            PrifuWarning,
            stacklevel=3,
        )


def _check_budget(
    max_drop: float | None, keep: float | None, macs: float | None, steps: int
) -> None:
    if sum(budget is not None for budget in (max_drop, keep, macs)) != 1:
        raise ConfigError("Give one budget: max_drop=, keep= or macs=.")
    for name, share in (("keep", keep), ("macs", macs)):
        if share is not None and not 0 < number(name, share) <= 1:
            raise ConfigError(f"{name}={share!r} is no share in (0, 1]: pass 0.5 for a half.")
    if max_drop is not None and not number("max_drop", max_drop) >= 0:
        raise ConfigError(f"max_drop={max_drop!r}: pass how far the metric may fall, 0 or more.")
    whole_number("steps", steps)


@contextmanager
def _at(model: nn.Module, alpha: float) -> Iterator[None]:
    units = list(filters(model).values())
    before = [unit.alpha for unit in units]
    for unit in units:
        unit.alpha = alpha
    try:
        yield
    finally:
        for unit, old in zip(units, before, strict=True):
            unit.alpha = old


def _evaluate(model: nn.Module, data: Data, alpha: float, metric: Metric, macs: bool) -> Threshold:
    device = device_of(model)
    total, count = 0.0, 0
    # Noise on an upload is the same for every threshold.
    with undisturbed(model), torch.no_grad(), seeded(0, device):
        model.eval()
        first, outputs = None, []
        for x, target in pairs(data, device):
            first = x[:2] if first is None else first
            output = model(x)
            values = metric(output, target)
            if metric is are_right and output.numel() == len(x):
                outputs.append(output.flatten())
            if not isinstance(values, Tensor) or values.shape != (len(x),):
                what = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise ConfigError(
                    f"metric returns {what} for {len(x)} samples: return one number a sample, "
                    f"({len(x)},), without averaging."
                )
            total, count = total + float(values.double().sum()), count + len(x)
    if outputs:
        check_logits(torch.cat(outputs))
    units = filters(model).values()
    share = sum(int(u.open.sum()) for u in units) / sum(u.weight.numel() for u in units)
    after = None
    if macs:
        from prifu_plugin.prune.run import prune, report

        before, pruned = report(prune(model, first)).macs
        after = pruned / before
    return Threshold(alpha, total / count, share, after)
