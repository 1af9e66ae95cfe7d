"""Runs without the noise of cut filters, which is drawn anew each time."""

from __future__ import annotations

from torch import nn

from prifu_plugin.cut import CutFilter

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
