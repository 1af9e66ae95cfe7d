"""Whether a model does its task at all: at chance, filters protect perfectly and mean nothing."""

from __future__ import annotations

import math
import warnings

from torch import Tensor

from prifu_plugin.errors import ConfigError, PrifuWarning


def learned(outputs: Tensor, targets: Tensor) -> bool:
    """Say whether predictions beat the most frequent class, and warn if they do not.

    A network that filters have starved, or that never learned, hides everything from everyone;
    look here before believing that a leak is low.

    Args:
        outputs: logits (N, classes), on data that were not trained on.
        targets: classes (N,), integers.

    Returns:
        Whether accuracy is above the share of the most frequent class by more than chance gives
        one time in forty.

    Raises:
        ConfigError: for shapes that do not fit.

    Example:
        >>> import torch
        >>> learned(torch.eye(2).repeat(20, 1), torch.tensor([0, 1]).repeat(20))
        True
    """
    if outputs.ndim != 2 or targets.shape != outputs.shape[:1] or not len(targets):
        raise ConfigError(
            f"outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)}: pass logits "
            "(N, classes) and classes (N,)."
        )
    if targets.is_floating_point():
        raise ConfigError(f"targets are {targets.dtype}: pass classes, integers from 0.")
    right = float((outputs.argmax(1) == targets).double().mean())
    if is_above_chance(right, targets):
        return True
    chance = float(targets.bincount().max()) / len(targets)
    warnings.warn(
        f"The model is at chance: {100 * right:.1f} % right, and {100 * chance:.1f} % by always "
        "giving the most frequent answer. What it hides says nothing about filters. Lower alpha "
        "or the dose, train longer, or let alpha grow from 0 with FilterSchedule.",
        PrifuWarning,
        stacklevel=2,
    )
    return False


def is_above_chance(accuracy: float, targets: Tensor) -> bool:
    """Return whether an accuracy on targets (N,) beats the most frequent class."""
    count = len(targets)
    chance = float(targets.bincount().max()) / count
    return accuracy > chance + 1.96 * math.sqrt(chance * (1 - chance) / count)
