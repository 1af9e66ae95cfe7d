"""What a pruned model keeps of its original: plain attributes and the memory format."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn


def keep_attributes(original: nn.Module, pruned: nn.Module) -> None:
    """Give a pruned model what others ask its original for, such as num_classes and pretrained_cfg.

    Args:
        original: whose attributes they are; those that hold more than plain data are left out.
        pruned: what takes its place; copies of a graph keep them.
    """
    kept = {
        name: value
        for name, value in vars(original).items()
        if not name.startswith("_") and _is_plain(value) and not hasattr(pruned, name)
    }
    if isinstance(pruned, fx.GraphModule):
        pruned.meta["_user_preserved_attributes"] = kept  # torch's name for it
    for name, value in kept.items():
        setattr(pruned, name, value)


def keep_memory_format(original: nn.Module, pruned: nn.Module) -> None:
    """Put kernels channels last where the original's are."""
    if any(_is_channels_last(parameter) for parameter in original.parameters()):
        for parameter in pruned.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _is_channels_last(kernel: Tensor) -> bool:
    last = kernel.ndim == 4 and kernel.is_contiguous(memory_format=torch.channels_last)
    return last and not kernel.is_contiguous()  # one channel, or one place, is both


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(_is_plain(item) for pair in value.items() for item in pair)
    return value is None or isinstance(value, bool | int | float | str)
