"""Where a module is."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

CPU = torch.device("cpu")


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a module's first parameter or buffer; the CPU if it has none.

    Example:
        >>> device_of(nn.Linear(2, 2))
        device(type='cpu')
    """
    first: Tensor | None = next(itertools.chain(module.parameters(), module.buffers()), None)
    return CPU if first is None else first.device
