"""Keep other weight decay off the filters: W has a group of its own for the length of a step."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from prifu_plugin.errors import OrderError
from prifu_plugin.filter import PriFU
from prifu_plugin.sharded import is_sharded

Group = dict[str, Any]

_DECAYS = {"weight_decay", "lambd"}
"""What optimizers call the share of a weight that each step takes off (lambd: ASGD)."""

_SHIELDED: weakref.WeakKeyDictionary[Optimizer, list[tuple[Group, list[Tensor], Group]]] = (
    weakref.WeakKeyDictionary()
)
"""Optimizer -> its groups, the parameters each had, and the group that was added for it."""


class Before(NamedTuple):
    """A filter before a step: its learning rate, W and the gradient.

    A gradient that is lent to coupled decay is remembered as it was, and the version it is lent at.
    """

    unit: PriFU
    rate: float
    weight: Tensor
    grad: Tensor | None
    lent: Tensor | None = None
    version: int = -1


def shield(optimizer: Optimizer, filters: dict[int, PriFU]) -> None:
    """Move W into a group without weight decay, for the length of one step."""
    shielded: list[tuple[Group, list[Tensor], Group]] = []
    for group in optimizer.param_groups:
        weights = [p for p in group["params"] if id(p) in filters]
        if not weights or not any(group.get(name) for name in _DECAYS):
            continue
        own = {k: v.clone() if isinstance(v, Tensor) else v for k, v in group.items()}
        off = dict.fromkeys(_DECAYS & own.keys(), 0.0)
        shielded.append((group, group["params"], {**own, "params": weights, **off}))
        group["params"] = [p for p in group["params"] if id(p) not in filters]
    if not shielded:
        return
    wraps_another = not hasattr(optimizer, "_optimizer_state_dict_pre_hooks")  # timm's Lookahead
    if optimizer not in _GUARDED and not wraps_another:
        # A step that fails in its middle must not reach a checkpoint.
        optimizer.register_state_dict_pre_hook(_forget)
        _GUARDED.add(optimizer)
    _SHIELDED[optimizer] = shielded
    optimizer.param_groups.extend(extra for _, _, extra in shielded)


_GUARDED: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def restore(optimizer: Optimizer) -> bool:
    """Undo the shield; return whether there was one."""
    shielded = _SHIELDED.pop(optimizer, [])
    for group, params, extra in shielded:
        group["params"] = params
        # Others may have added groups since, behind ours.
        optimizer.param_groups[:] = [g for g in optimizer.param_groups if g is not extra]
    return bool(shielded)


def _forget(optimizer: Optimizer) -> None:
    restore(optimizer)


def check_groups(optimizer: Optimizer, remembered: Sequence[Before]) -> None:
    """Raise if a step that should have moved W did not: it knows its groups by their positions."""
    for unit, rate, before, grad, *_ in remembered:
        if is_sharded(before):  # asking would gather it
            continue
        if grad is None or rate * float(grad.abs().max()) < 1e-5 * float(before.abs().max()):
            continue
        unmoved = torch.equal(unit.weight.detach(), before)
        if unmoved and optimizer.state.get(unit.weight) and optimizer not in _STILL:
            _STILL.add(optimizer)  # a first step may do no more than begin its averages
            return
        _KNOWN.add(optimizer)
        if unmoved:
            raise OrderError(
                f"{type(optimizer).__name__} leaves out the group that keeps its weight decay off "
                "the filters. Give them one when you build it: [{'params': rest}, {'params': "
                "[u.weight for u in prifu_plugin.filters(model).values()], 'weight_decay': 0.0}]."
            )
        return


_STILL: weakref.WeakSet[Optimizer] = weakref.WeakSet()
"""Optimizers whose step has noted something of a W once, and left it where it was."""

_KNOWN: weakref.WeakSet[Optimizer] = weakref.WeakSet()
"""Optimizers that were seen to step the group that shields filters from weight decay."""


def is_known(optimizer: Optimizer) -> bool:
    """Whether an optimizer was seen to step the group that is added."""
    return optimizer in _KNOWN
