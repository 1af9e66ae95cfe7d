"""Whether an operation that moved labels moves every value, and its gradient with it.

An operation can look like a movement on a few values and be none: a threshold far below them, a
decision on how large they are, an identity with a gradient of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from prifu_plugin.prune.rules.base import Analysis

Results = Callable[[Tensor], list[Tensor]]
"""Runs an operation on a tensor; returns what it gives."""

_MODULES = (
    *(nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle),
    *(nn.ChannelShuffle, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.Fold, nn.Unfold),
)
_NAMES = {
    *("view", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "squeeze"),
    *("unsqueeze", "expand", "narrow", "select", "chunk", "split", "unbind", "movedim", "getitem"),
    *("contiguous", "clone", "roll", "flip", "repeat", "repeat_interleave", "pad", "swapaxes"),
    *("pixel_shuffle", "pixel_unshuffle", "tensor_split", "unfold", "tile", "rot90", "diagonal"),
}


def is_movement_by_name(analysis: Analysis, node: fx.Node) -> bool:
    """Whether torch itself says that an operation moves values and does nothing else."""
    if node.op == "call_module":
        return type(analysis.module(node)) in _MODULES
    if node.op == "call_method":
        return node.target in _NAMES
    home = getattr(node.target, "__module__", None) or ""
    known = home.split(".")[0] in ("torch", "_operator", "")
    return known and getattr(node.target, "__name__", "") in _NAMES


def passes_everything(run: Results, labels: Tensor, moved: list[Tensor]) -> bool:
    """Whether values of any size pass as the labels did, and gradients come back.

    Args:
        run: the operation.
        labels: what it was run on, 0 for padding.
        moved: the labels that it returned.
    """
    for table in _tables(int(labels.max())):
        found = run(table[labels.long()])
        if len(found) != len(moved):
            return False
        if any(not torch.equal(f, table[m.long()]) for f, m in zip(found, moved, strict=True)):
            return False
    return _gradients_pass(run, labels)


def _tables(size: int) -> list[Tensor]:
    """Return values for each label: of all magnitudes, huge and negative, tiny."""
    generator = torch.Generator().manual_seed(2)
    draw: dict[str, Any] = {"dtype": torch.float64, "generator": generator}
    signed = torch.randn(size + 1, **draw) * 10.0 ** (60 * torch.rand(size + 1, **draw) - 30)
    signed[1 :: max(2, size // 3)] = torch.inf
    signed[2 :: max(2, size // 2)] = -torch.inf
    negative = -(1 + torch.rand(size + 1, **draw)) * 1e30
    tables = [signed, negative, torch.randn(size + 1, **draw) * 1e-30]
    for table in tables:
        table[0] = 0.0
    return tables


def _gradients_pass(run: Results, labels: Tensor) -> bool:
    """Whether each value gets the gradients of all places it went to."""
    places = torch.arange(1, labels.numel() + 1, dtype=torch.float64).reshape(labels.shape)
    generator = torch.Generator().manual_seed(3)
    x = places.clone().requires_grad_()
    with torch.enable_grad():
        found = run(x)
        if not all(result.requires_grad for result in found):
            return False
        sent = [torch.randn(f.shape, dtype=f.dtype, generator=generator) for f in found]
        (back,) = torch.autograd.grad(found, x, sent)
    expected = torch.zeros(labels.numel() + 1, dtype=torch.float64)
    for result, gradient in zip(found, sent, strict=True):
        expected.index_add_(0, result.detach().long().flatten(), gradient.flatten())
    return torch.allclose(back, expected[1:].reshape(labels.shape))
