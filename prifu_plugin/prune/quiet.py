"""Runs that can be compared: without the noise of cut filters, and with the same draws."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from prifu_plugin.cut import CutFilter
from prifu_plugin.device import CPU, seeded

NOISE = "prifu_noise."
"""Prefix of the buffers of a pruned model that hold noise deviations."""


class Quiet:
    """Switch off the noise of cut filters, wrapped or pruned, inside a with block."""

    def __init__(self, model: nn.Module) -> None:
        self.units = [m for m in model.modules() if isinstance(m, CutFilter)]
        self.vectors = [buffer for name, buffer in model.named_buffers() if name.startswith(NOISE)]

    def __enter__(self) -> None:
        self.levels = [unit.noise for unit in self.units]
        self.copies = [vector.clone() for vector in self.vectors]
        for unit in self.units:
            unit.noise = 0.0
        for vector in self.vectors:
            vector.zero_()

    def __exit__(self, *_: object) -> None:
        for unit, level in zip(self.units, self.levels, strict=True):
            unit.noise = level
        for vector, value in zip(self.vectors, self.copies, strict=True):
            vector.copy_(value)


class DrawingAlike(TorchDispatchMode):
    """Let every operation that draws at random draw the same, in whatever order they come.

    Args:
        device: where operations draw, beside the CPU.

    Example:
        >>> with DrawingAlike():
        ...     torch.equal(torch.rand(3), torch.rand(3))
        True
    """

    supports_higher_order_operators = True

    def __init__(self, device: torch.device = CPU) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, with generators seeded for it if it draws."""
        if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
            return func(*args, **(kwargs or {}))
        with seeded(0, self.device):
            return func(*args, **(kwargs or {}))
