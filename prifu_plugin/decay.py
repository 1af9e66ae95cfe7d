"""The training hook: the decay gradient of Eq. 6 and the zeroing of Eq. 11.

Two global hooks stand around every optimizer's step. Around the step and not in the gradient,
because a step may compute its gradients inside (closures), unscale them inside (fused optimizers
under a GradScaler) or normalize a gradient term away (Adam).
"""

from __future__ import annotations

import functools
import math
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from prifu_plugin.arguments import number
from prifu_plugin.coupled import as_lent, check_coupled, couple, give_back, rate_of
from prifu_plugin.errors import ConfigError, FilterError, PrifuWarning
from prifu_plugin.filter import LIVE_FILTERS, PriFU
from prifu_plugin.ownership import check_ownership, count_step, note_step
from prifu_plugin.sharded import is_sharded, own_part, own_rows, summed, whole
from prifu_plugin.shield import Before, check_groups, is_known, restore, shield

Group = dict[str, Any]


def dose_to_beta(dose: float, learning_rates: Iterable[float]) -> float:
    """Return the beta that decays W by exp(-dose) over a run.

    What the decay does depends on dose = beta * sum of the learning rates of all steps: the
    authors' 80 epochs at beta = 0.001 give 2.6, a short fine-tune at that beta gives nothing.

    Args:
        dose: wanted dose, at least 0.
        learning_rates: the learning rate of every optimizer step of the run.

    Returns:
        beta for `prifu_plugin.wrap`.

    Raises:
        ConfigError: if the rates do not sum to something positive, or dose is negative.

    Example:
        >>> round(dose_to_beta(2.6, [0.1] * 100), 4)
        0.26
    """
    if isinstance(learning_rates, int | float):
        raise ConfigError(
            f"learning_rates={learning_rates} is one number: pass the rate of every step, "
            f"[{learning_rates}] * steps where it is constant."
        )
    if not isinstance(learning_rates, Iterable):
        raise ConfigError(
            f"learning_rates is a {type(learning_rates).__name__}: pass a list, the rate of every "
            "step, as a scheduler's get_last_lr()[0] gives them one by one."
        )
    rates = [number("learning_rates", rate) for rate in learning_rates]
    total, dose = sum(rates), number("dose", dose)
    finite = math.isfinite(dose) and math.isfinite(total)
    if not finite or dose < 0 or total <= 0 or min(rates) < 0:
        raise ConfigError(
            f"dose={dose} over learning rates that sum to {total}: pass dose >= 0 "
            "and the learning rate of every step, none below 0."
        )
    return dose / total


def _before_step(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: Group
) -> tuple[tuple[Any, ...], Group] | None:
    """Remember W of the filters in this optimizer, and shield them from other weight decay."""
    restore(optimizer)
    _end_of_step(optimizer)
    give_back(_REMEMBERED.pop(optimizer, []))  # of a step that another hook refused
    filters = {id(unit.weight): unit for unit in LIVE_FILTERS}
    if not filters:
        return None
    owned = _owned_filters(optimizer, filters)
    if _only_passes_on(optimizer):
        note_step(optimizer, [unit for unit, _ in owned], inside=bool(_running()))
        _RUNNING.append((weakref.ref(optimizer), set()))
        return None
    closure = bool(_closures(args, kwargs))
    check_ownership(optimizer, filters.values(), {id(u) for u, _ in owned}, makes_gradients=closure)
    note_step(optimizer, [unit for unit, _ in owned], inside=bool(_running()))
    _check_finite(optimizer, [unit for unit, _ in owned])
    remembered = []
    for unit, group in owned:
        rate = rate_of(optimizer, group)
        if rate * unit.beta >= 1:
            raise ConfigError(
                f"lr * beta = {rate} * {unit.beta} >= 1 at the filter of '{unit.path}': one step "
                "would flip the sign of W. Lower beta (dose_to_beta computes it) or the rate."
            )
        if unit.decay == "coupled":
            check_coupled(optimizer, unit, group, closure=closure, inside=bool(_running()))
    for unit, group in owned:
        grad, before = unit.weight.grad, unit.weight.detach().clone()
        lent = couple(optimizer, unit, group) if unit.decay == "coupled" else None
        remembered.append(Before(unit, rate_of(optimizer, group), before, grad, lent))
    # Only now: gradients that are views of one bucket, as DDP's may be, count versions together.
    remembered = [as_lent(one) for one in remembered]
    _REMEMBERED[optimizer] = remembered
    _RUNNING.append((weakref.ref(optimizer), set()))
    shield(optimizer, filters)
    units = [unit for unit, _ in owned]
    given = tuple(_guarded(a, optimizer, units) if callable(a) else a for a in args[1:])
    named = {k: _guarded(v, optimizer, units) if callable(v) else v for k, v in kwargs.items()}
    return (*args[:1], *given), named


def _guarded(
    closure: Callable[..., Any], optimizer: Optimizer, filters: list[PriFU]
) -> Callable[..., Any]:
    """Return a closure whose gradients are looked at; an error leaves the optimizer as it was."""

    @functools.wraps(closure)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            loss = closure(*args, **kwargs)
            _check_finite(optimizer, filters)
            return loss
        except BaseException:
            restore(optimizer)
            _end_of_step(optimizer)
            _REMEMBERED.pop(optimizer, None)
            raise

    return guarded


def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: Group) -> None:
    """Apply the decay, zero what is filtered, and forget its optimizer state (Eq. 6 and 11)."""
    was_shielded = restore(optimizer)
    remembered = _REMEMBERED.pop(optimizer, [])
    decayed = _end_of_step(optimizer)
    if _only_passes_on(optimizer):
        _follow(optimizer, decayed)
    if _skipped(optimizer) or _only_passes_on(optimizer):
        return
    if was_shielded and not is_known(optimizer):
        check_groups(optimizer, remembered)
    stepped = []
    give_back(remembered)
    with torch.no_grad():
        for unit, rate, before, grad, *_ in remembered:
            # Some steps free the gradients; closures make them.
            if unit.weight.grad is None and (grad is None or _closures(args, kwargs)):
                continue
            # A wrapper (Lookahead, SAM) calls the step of the optimizer inside, which decayed W.
            if id(unit) not in decayed and unit.decay == "decoupled":
                unit.weight.sub_(before, alpha=rate * unit.beta)
                unit.dose += rate * unit.beta
            stepped.append(unit)
            if rate > 0:
                count_step(unit)
        for _, others in _RUNNING:
            others.update(map(id, stepped))
        _filter(stepped, optimizer)
    if _closures(args, kwargs):
        # A closure makes its gradients in the step, so that only now it is known who has some.
        filters = {id(unit.weight): unit for unit in LIVE_FILTERS}
        owned = {id(unit) for unit, _ in _owned_filters(optimizer, filters)}
        check_ownership(optimizer, filters.values(), owned)


def _follow(optimizer: Optimizer, decayed: set[int]) -> None:
    """Note what other processes did to the filters of theirs, whose W has just arrived."""
    filters = {id(unit.weight): unit for unit in LIVE_FILTERS}
    arrived = []
    for unit, group in _owned_filters(optimizer, filters):
        if unit.weight.grad is not None and id(unit) not in decayed:
            unit.dose += rate_of(optimizer, group) * unit.beta
            count_step(unit)
            arrived.append(unit)
    with torch.no_grad():
        _filter(arrived, optimizer)


def _closures(args: tuple[Any, ...], kwargs: Group) -> list[Any]:
    return [given for given in (*args[1:], *kwargs.values()) if callable(given)]


def _filter(units: list[PriFU], optimizer: Optimizer) -> None:
    """Zero what is filtered, for good."""
    weights = whole([unit.weight.detach() for unit in units])
    for unit, weight in zip(units, weights, strict=True):
        closed = unit.decide(weight)
        unit.filtered.copy_(closed)
        own = closed[own_rows(unit.weight)]
        own_part(unit.weight).masked_fill_(own, 0.0)
        for value in optimizer.state.get(unit.weight, {}).values():
            if isinstance(value, Tensor) and value.shape == closed.shape:
                own_part(value).masked_fill_(own, 0.0)


_REMEMBERED: weakref.WeakKeyDictionary[Optimizer, list[Before]] = weakref.WeakKeyDictionary()
_RUNNING: list[tuple[weakref.ref[Optimizer], set[int]]] = []
"""Steps that have begun, the outermost first, and the filters that steps inside have decayed."""


def _running() -> list[Optimizer]:
    """Return the optimizers whose steps have begun; those that an exception ended are forgotten."""
    if not _RUNNING:
        return []
    stepping = _on_the_stack()
    _RUNNING[:] = [(running, decayed) for running, decayed in _RUNNING if id(running()) in stepping]
    return [optimizer for optimizer in (running() for running, _ in _RUNNING) if optimizer]


def _on_the_stack() -> set[int]:
    """Return the ids of what is first among the arguments of torch's wrapper around steps."""
    found: set[int] = set()
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == Optimizer.__module__:
            found.update(id(given) for given in frame.f_locals.get("args", ())[:1])
    return found


def _only_passes_on(optimizer: Optimizer) -> bool:
    """Whether an optimizer's step is that of one inside, whose result it then distributes."""
    return type(optimizer).__name__ == "ZeroRedundancyOptimizer"


def _end_of_step(optimizer: Optimizer) -> set[int]:
    """Forget a step, and those inside that an exception ended; return what was decayed in it."""
    for place, (running, decayed) in enumerate(_RUNNING):
        if running() is optimizer:
            del _RUNNING[place:]
            return decayed
    return set()


def _owned_filters(optimizer: Optimizer, filters: dict[int, PriFU]) -> list[tuple[PriFU, Group]]:
    return [
        (filters[id(parameter)], group)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if id(parameter) in filters and parameter.requires_grad
    ]


def _skipped(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer skipped the step because its gradients overflowed."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


_DEAD: weakref.WeakSet[PriFU] = weakref.WeakSet()


def _check_finite(optimizer: Optimizer, filters: list[PriFU]) -> None:
    """Refuse a step that would spread a W or gradient that is not finite; name dead layers.

    All in one synchronization a device: what is wrong is looked for only if something is. Processes
    that share W all stop, whichever holds the part that is wrong.
    """
    scaled = getattr(optimizer, "found_inf", None) is not None  # such steps skip themselves
    by_device: dict[torch.device, list[tuple[PriFU, Tensor]]] = {}
    weights = [unit.weight.detach() for unit in filters]
    peaks = []
    for unit, weight in zip(filters, weights, strict=True):
        grad = None if scaled else unit.weight.grad
        if is_sharded(weight):  # each process looks at its own part, which may be empty
            peak = own_part(weight).sum() * 0 + (unit.filtered == 0).any()
        else:
            peak = weight.amax() + weight.amin() * 0
        peaks.append(peak + (own_part(grad).sum() * 0 if grad is not None else 0))
    for unit, peak in zip(filters, summed(weights, peaks), strict=True):
        by_device.setdefault(peak.device, []).append((unit, peak))
    for found in by_device.values():
        values = torch.stack([value for _, value in found]).tolist()
        for (unit, _), peak in zip(found, values, strict=True):
            if peak != peak or abs(peak) == float("inf"):
                _explain(unit)
            if peak <= 0 and unit not in _DEAD:
                _DEAD.add(unit)
                warnings.warn(
                    f"All channels of the filter at '{unit.path}' are closed: what follows sees "
                    "a constant. Lower alpha or beta, or leave the layer out with exclude=.",
                    PrifuWarning,
                    stacklevel=2,
                )


def _explain(unit: PriFU) -> None:
    unit.check_finite()
    what = "W, or its gradient," if is_sharded(unit.weight) else "The gradient of W"
    raise FilterError(
        f"{what} of the filter at '{unit.path}' is not finite, so that this step would "
        "ruin all weights; nothing was changed. Lower the learning rate, or look for the input "
        "that gives no finite loss."
    )


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
