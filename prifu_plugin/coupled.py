"""Coupled decay, as in the authors' code: beta * W in SGD's gradient, for the length of a step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from prifu_plugin.errors import ConfigError
from prifu_plugin.filter import PriFU
from prifu_plugin.shield import Before

Group = dict[str, Any]


def check_coupled(
    optimizer: Optimizer, unit: PriFU, group: Group, *, closure: bool, inside: bool
) -> None:
    """Raise if beta * W in the gradient would not be what is asked for.

    Args:
        optimizer: whose step begins.
        unit: a filter it holds.
        group: its group of parameters with W.
        closure: whether the step makes its gradients itself.
        inside: whether the step of another optimizer calls it.

    Raises:
        ConfigError: for anything but plain SGD, and for a decay that would carry W beyond 0.
    """
    scaled = getattr(optimizer, "grad_scale", None) is not None
    plain = isinstance(optimizer, torch.optim.SGD) and not inside
    if not plain or closure or scaled or group.get("maximize") or group.get("nesterov"):
        raise ConfigError(
            "decay='coupled' puts beta * W into the gradient, which is right for torch.optim.SGD "
            "without a closure, fused scaling, maximize, nesterov or a wrapper around it. Use "
            "decay='decoupled' for anything else."
        )
    momentum = float(group["momentum"])
    # W alone follows z**2 - (1 + momentum - lr * beta) * z + momentum = 0; SGD does not dampen the
    # first of its gradients.
    if rate_of(optimizer, group) * unit.beta > (1 - math.sqrt(momentum)) ** 2:
        raise ConfigError(
            f"lr * beta = {rate_of(optimizer, group) * unit.beta:g} at the filter of '{unit.path}' "
            f"is more than {(1 - math.sqrt(momentum)) ** 2:g}: with momentum={momentum} "
            "the decay would carry W beyond 0. Lower beta or the rate."
        )


def couple(optimizer: Optimizer, unit: PriFU, group: Group) -> Tensor | None:
    """Put beta * W into the gradient for the step; return it as it was."""
    if unit.weight.grad is None:
        return None
    lent = unit.weight.grad.detach().clone()
    rate, momentum = float(group["lr"]), float(group["momentum"])
    with torch.no_grad():
        unit.weight.grad.add_(unit.weight, alpha=unit.beta)
    # SGD damps every gradient but the first, which starts its buffer.
    first = optimizer.state.get(unit.weight, {}).get("momentum_buffer") is None
    damped = 1.0 if first or not momentum else 1 - float(group["dampening"])
    if unit.beta:
        unit.dose += damped * rate * unit.beta / (1 - momentum)
    return lent


def as_lent(before: Before) -> Before:
    """Note at which version a gradient was lent."""
    if before.lent is None or before.grad is None:
        return before
    return before._replace(version=before.grad._version)


def give_back(remembered: list[Before]) -> None:
    """Take beta * W out of gradients again: who accumulates them does not accumulate the decay."""
    due = [one for one in remembered if one.grad is not None and one.grad._version == one.version]
    with torch.no_grad():
        for one in due:
            if one.lent is not None and one.grad is not None:
                one.grad.copy_(one.lent)


def rate_of(optimizer: Optimizer, group: Group) -> float:
    """Return the learning rate of a group, or raise ConfigError if it has none of its own."""
    if group.get("lr") is None:
        raise ConfigError(
            f"{type(optimizer).__name__} has no learning rate of its own (lr="
            f"{group.get('lr', 'missing')}), and the decay of W is lr * beta: pass lr=."
        )
    return float(group["lr"])
