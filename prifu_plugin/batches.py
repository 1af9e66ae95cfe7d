"""Batches as loaders give them, checked before a model sees them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from prifu_plugin.errors import ConfigError


def pairs(data: Iterable[Any], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs (N, ...) and targets (N, ...) of each batch, on a device.

    Args:
        data: batches (x, target) of tensors.
        device: where both are wanted.

    Raises:
        ConfigError: for anything else; it says what the batch is.

    Example:
        >>> x, y = next(pairs([(torch.ones(2, 3), torch.tensor([0, 1]))], torch.device("cpu")))
        >>> x.shape, y.tolist()
        (torch.Size([2, 3]), [0, 1])
    """
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(x, Tensor) for x in data):
        raise ConfigError("data is one batch (x, target): pass a list of batches, [(x, target)].")
    _check_iterable(data, "data", "(x, target)")
    for batch in data:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ConfigError(
                f"A batch of data is {_said(batch)}: pass batches (x, target), for instance "
                "[(b['image'], b['label']) for b in loader]."
            )
        x, target = batch
        if not isinstance(x, Tensor) or not isinstance(target, Tensor):
            raise ConfigError(
                f"A batch of data is ({type(x).__name__}, {type(target).__name__}): both must be "
                "tensors, as torch.as_tensor makes them."
            )
        if not len(x) or len(target) != len(x):
            raise ConfigError(f"A batch of data has {len(x)} inputs and {len(target)} targets.")
        yield x.to(device), target.to(device)


def check_repeatable(data: Iterable[Any]) -> None:
    """Raise ConfigError unless data can be read several times and is not empty."""
    _check_iterable(data, "data", "(x, target)")
    if isinstance(data, Iterator):
        raise ConfigError(
            "data is an iterator, which can be read once, and it is read for each threshold: pass "
            "a list or a DataLoader."
        )
    if next(iter(data), None) is None:
        raise ConfigError("data is empty: pass batches (x, target).")


def inputs(batches: Iterable[Any], device: torch.device) -> Iterator[Tensor]:
    """Yield the inputs of batches, each a tensor or a pair whose first is the input."""
    if isinstance(batches, Tensor):
        raise ConfigError("batches is one tensor: pass a list of batches, [x].")
    _check_iterable(batches, "batches", "of inputs (N, ...)")
    for batch in batches:
        x = batch[0] if isinstance(batch, list | tuple) and batch else batch
        if not isinstance(x, Tensor):
            raise ConfigError(
                f"A batch is {_said(batch)}: pass tensors (N, ...), or pairs whose first is one."
            )
        yield x.to(device)


def _check_iterable(data: Any, name: str, holding: str) -> None:
    if not isinstance(data, Iterable):
        raise ConfigError(f"{name} is a {type(data).__name__}: pass batches {holding}.")


def _said(batch: Any) -> str:
    if isinstance(batch, tuple | list):
        return f"a {type(batch).__name__} of {len(batch)}"
    return f"a {type(batch).__name__}"
