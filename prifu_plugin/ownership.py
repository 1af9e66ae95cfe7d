"""Who trains a filter: exactly one optimizer, or there is an error or a warning."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from prifu_plugin.errors import OrderError, PrifuWarning
from prifu_plugin.filter import WRAPPED, PriFU


class _Steps:
    """Who has stepped a filter, who did before, and how often."""

    def __init__(self) -> None:
        self.count = 0
        self.last: weakref.ref[Optimizer] | None = None
        self.earlier: weakref.WeakSet[Optimizer] = weakref.WeakSet()


_STEPS: weakref.WeakKeyDictionary[PriFU, _Steps] = weakref.WeakKeyDictionary()
_WAITING: weakref.WeakKeyDictionary[Optimizer, dict[int, weakref.ref[PriFU]]] = (
    weakref.WeakKeyDictionary()
)
"""Optimizer -> filters beside its parameters that another one holds, by the id of W."""


def note_step(optimizer: Optimizer, units: Sequence[PriFU], *, inside: bool) -> None:
    """Note that an optimizer steps filters.

    Args:
        optimizer: whose step begins.
        units: the filters it holds.
        inside: whether it is called by the step of a wrapper, which decays nothing itself.

    Raises:
        OrderError: if two optimizers step a filter in turn, which would decay it twice.
    """
    if inside:
        return
    _warn_of_lowered(units)
    for unit in units:
        steps = _STEPS.setdefault(unit, _Steps())
        last = steps.last() if steps.last is not None else None
        if last is optimizer:
            continue
        if optimizer in steps.earlier:
            raise OrderError(
                f"Two optimizers step the filter at '{unit.path}' in turn, which decays it twice. "
                "Give the filters to one of them, or build a new one for a new stage of training."
            )
        if last is not None:
            steps.earlier.add(last)
        steps.last = weakref.ref(optimizer)


def _warn_of_lowered(units: Sequence[PriFU]) -> None:
    """Warn, once for each filter, of an alpha below that of earlier steps or of a checkpoint."""
    lowered = [unit for unit in units if unit.alpha < unit.stepped_alpha]
    lowered = [u for u in lowered if u not in _LOWERED and bool(u.filtered.any())]
    _LOWERED.update(lowered)
    if lowered:
        first, more = lowered[0], len(lowered) - 1
        warnings.warn(
            f"alpha of the filter at '{first.path}'{f' and of {more} others' if more else ''} was "
            f"lowered from {first.stepped_alpha:g} to {first.alpha:g}: channels filtered before "
            "stay closed. Zero its `filtered` and give W new values there to let them learn again.",
            PrifuWarning,
            stacklevel=4,
        )
    for unit in units:
        unit.stepped_alpha = unit.alpha


_LOWERED: weakref.WeakSet[PriFU] = weakref.WeakSet()


def count_step(unit: PriFU) -> None:
    """Count a step that has changed a filter: one that had a gradient, at a rate above 0."""
    _STEPS.setdefault(unit, _Steps()).count += 1


def steps_of(unit: PriFU) -> int:
    """Return how many optimizer steps have changed a filter."""
    return _STEPS[unit].count if unit in _STEPS else 0


def check_ownership(
    optimizer: Optimizer,
    filters: Iterable[PriFU],
    owned: set[int],
    *,
    makes_gradients: bool = False,
) -> None:
    """Raise if an optimizer trains a model but not its filters, and no other one does.

    Args:
        optimizer: whose step begins or ends.
        filters: all filters there are.
        owned: ids of those that this optimizer holds.
        makes_gradients: whether the step will make gradients, in a closure.

    Raises:
        OrderError: if filters that have gradients are in no optimizer.
    """
    waiting = _WAITING.setdefault(optimizer, {})
    _warn_of_waiting(waiting)
    orphans = [
        unit
        for unit in filters
        if id(unit) not in owned
        and id(unit.weight) not in waiting
        and unit.weight.requires_grad
        and unit.weight.grad is not None
    ]
    if not orphans:
        return
    if makes_gradients or _has_gradients(optimizer):
        orphans = _trained_beside(optimizer, orphans, makes_gradients)
    if not orphans:
        return
    held = _held_by_others(optimizer)
    # Looking through all objects is slow: what was found once is not looked for again.
    waiting.update({id(u.weight): weakref.ref(u) for u in orphans if id(u.weight) in held})
    orphans = [unit for unit in orphans if id(unit.weight) not in held]
    if orphans:
        raise OrderError(
            f"{len(orphans)} filters are in no optimizer (first: '{orphans[0].path}.prifu.weight')"
            f", so they would never train; {type(optimizer).__name__} was probably built before "
            "wrap, or their W was replaced since, as fully_shard and load_state_dict(assign=True) "
            "do. Call prifu_plugin.wrap first, then build the optimizer from model.parameters(). "
            "If they shall not train in this stage, freeze them (requires_grad_(False)) and drop "
            "old gradients: model.zero_grad(set_to_none=True)."
        )


def _trained_beside(optimizer: Optimizer, units: list[PriFU], makes_gradients: bool) -> list[PriFU]:
    """Return the filters of models that an optimizer has parameters of; others are remembered."""
    params = {id(p) for group in optimizer.param_groups for p in group["params"]}
    size, strangers = _STRANGERS.get(optimizer, (-1, weakref.WeakSet()))
    if size != len(params):
        strangers = weakref.WeakSet()
    units = [unit for unit in units if unit not in strangers]
    found_originals = {unit: _original(unit, params) for unit in units}
    originals = {unit: one for unit, one in found_originals.items() if one is not None}
    # What a closure will make of them is not known yet.
    idle = set() if makes_gradients else _idle(optimizer, list(originals.values()))
    left_alone = {unit for unit, original in originals.items() if id(original) in idle}
    found = [unit for unit in units if unit in left_alone or _is_in_one_model(unit, params)]
    strangers.update(set(units) - set(originals) - set(found))
    _STRANGERS[optimizer] = len(params), strangers
    return found


def _original(unit: PriFU, params: set[int]) -> nn.Parameter | None:
    """Return the parameter of the model that a filter's model is a copy of, if it is of these."""
    original = unit.origin() if unit.origin is not None else None
    return original if original is not None and id(original) in params else None


def _has_gradients(optimizer: Optimizer) -> bool:
    """Whether an optimizer has anything to step with: parameters that were replaced get none."""
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


def _idle(optimizer: Optimizer, parameters: list[nn.Parameter]) -> set[int]:
    """Return the ids of parameters without a gradient, with zeros, or with that of the last step.

    Those of a plain model that is trained for its own sake get new ones.
    """
    known = _GRADIENTS.setdefault(optimizer, {})
    idle, fresh = set(), []
    for parameter in {id(p): p for p in parameters}.values():  # filters of one model share theirs
        grad = parameter.grad
        before, version = known.get(id(parameter), (lambda: None, -1))
        if grad is None or (before() is grad and grad._version == version):
            idle.add(id(parameter))
        else:
            known[id(parameter)] = weakref.ref(grad), grad._version
            fresh.append(parameter)
    if fresh:
        told = torch.stack([p.grad.any().cpu() for p in fresh if p.grad is not None]).tolist()
        idle |= {id(parameter) for parameter, any_ in zip(fresh, told, strict=True) if not any_}
    return idle


_Gradient = tuple[Callable[[], torch.Tensor | None], int]
_GRADIENTS: weakref.WeakKeyDictionary[Optimizer, dict[int, _Gradient]] = weakref.WeakKeyDictionary()
"""The gradients that an optimizer last stepped with, by the parameter, and their versions."""

_STRANGERS: weakref.WeakKeyDictionary[Optimizer, tuple[int, weakref.WeakSet[PriFU]]] = (
    weakref.WeakKeyDictionary()
)


def _is_in_one_model(unit: PriFU, params: set[int]) -> bool:
    """Whether any of these is a parameter of the filter's own model."""
    return any(
        _holds(model, unit) and any(id(p) in params for p in model.parameters())
        for model in list(WRAPPED)
    )


def _holds(model: nn.Module, unit: PriFU) -> bool:
    return any(module is unit for module in model.modules())


def _held_by_others(optimizer: Optimizer) -> set[int]:
    return {
        id(parameter)
        for other in gc.get_objects()
        if issubclass(type(other), Optimizer) and other is not optimizer
        for group in other.param_groups
        for parameter in group["params"]
    }


def _warn_of_waiting(waiting: dict[int, weakref.ref[PriFU]]) -> None:
    """Warn of filters that another optimizer holds, but has not stepped since our last step."""
    for key, reference in list(waiting.items()):
        unit = reference()
        if unit is None:
            del waiting[key]  # its id may become another one's
        if unit is None or unit in _STEPS or unit in _WARNED:
            continue
        _WARNED.add(unit)
        warnings.warn(
            f"The filter at '{unit.path}' is held by an optimizer that has not made a step, while "
            "another one trains the layers beside it. If that is a leftover, build the one that "
            "trains from model.parameters() of the wrapped model.",
            PrifuWarning,
            stacklevel=3,
        )


_WARNED: weakref.WeakSet[PriFU] = weakref.WeakSet()
