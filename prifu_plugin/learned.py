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
        outputs: logits (N, classes), on data that were not trained on; of two classes the logit of
            the second alone will do, (N, 1) or (N,).
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
    right = float(are_right(outputs, targets).mean())
    check_logits(outputs)
    if is_above_chance(right, targets):
        return True
    chance = float(targets.long().bincount().max()) / len(targets)
    warnings.warn(
        f"The model is at chance: {100 * right:.1f} % right, and {100 * chance:.1f} % by always "
        "giving the most frequent answer. What it hides says nothing about filters. Lower alpha "
        "or the dose, train longer, or let alpha grow from 0 with FilterSchedule.",
        PrifuWarning,
        stacklevel=2,
    )
    return False


def are_right(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return 1.0 for each sample whose class is right, else 0.0, (N,), fp64.

    Args:
        outputs: logits (N, classes), or one logit of two classes, (N, 1) or (N,).
        targets: classes (N,), integers from 0.

    Raises:
        ConfigError: for anything else.

    Example:
        >>> import torch
        >>> are_right(torch.tensor([[2.0], [-1.0]]), torch.tensor([1, 1])).tolist()
        [1.0, 0.0]
    """
    if not isinstance(outputs, Tensor):
        raise ConfigError(
            f"The model returns a {type(outputs).__name__}: pass its logits (N, classes), or where "
            "a metric= is taken, one that looks into it."
        )
    if not isinstance(targets, Tensor):
        raise ConfigError(f"targets are a {type(targets).__name__}: pass a tensor of classes (N,).")
    flat = outputs.ndim == 1 or (outputs.ndim == 2 and outputs.shape[1] == 1)
    if not (flat or outputs.ndim == 2) or targets.shape != outputs.shape[:1] or not len(targets):
        raise ConfigError(
            f"outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)}: pass logits "
            "(N, classes) and classes (N,), or where a metric= is taken, one number a sample."
        )
    if targets.is_floating_point() or targets.is_complex():
        raise ConfigError(f"targets are {targets.dtype}: pass classes, integers from 0.")
    targets = targets.to(outputs.device).long()
    classes = 2 if flat else outputs.shape[1]
    if int(targets.min()) < 0 or int(targets.max()) >= classes:
        raise ConfigError(
            f"Targets reach from {int(targets.min())} to {int(targets.max())}, and the model has "
            f"{classes} classes: number them from 0."
        )
    return (named(outputs) == targets).double()


def named(outputs: Tensor) -> Tensor:
    """Return the class that logits (N, classes) name, (N,); a single logit is of class 1."""
    if outputs.ndim > 1 and outputs.shape[1] > 1:
        return outputs.argmax(1)
    return (outputs > 0).long().flatten()


def check_logits(outputs: Tensor) -> None:
    """Raise ConfigError if single outputs of a whole data set look like probabilities.

    Args:
        outputs: (N, classes), (N, 1) or (N,); said of one number a sample, between 0 and 1.
    """
    single = outputs.ndim == 1 or outputs.shape[1] == 1
    if not single or not outputs.is_floating_point() or len(outputs) < FEW:
        return
    least, most = (float(end) for end in outputs.detach().aminmax())
    between = ((outputs > 0) & (outputs < 1)).double().mean()
    if 0 <= least < 0.25 and 0.75 < most <= 1 and between > 0.5:
        raise ConfigError(
            f"Single outputs from {least:.2f} to {most:.2f} look like probabilities, of which all "
            "count as class 1, whose logits are above 0: let the model return logits, without the "
            "sigmoid, or where a metric= is taken, pass one for probabilities."
        )


FEW = 20
"""Outputs of which nothing is concluded."""


def is_above_chance(accuracy: float, targets: Tensor) -> bool:
    """Return whether an accuracy on targets (N,) beats the most frequent class."""
    count = len(targets)
    chance = float(targets.long().bincount().max()) / count
    return accuracy > chance + 1.96 * math.sqrt(chance * (1 - chance) / count)
