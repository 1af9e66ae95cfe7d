"""Transposed convolutions, which store their inputs before their outputs."""

from __future__ import annotations

from torch import Tensor, nn

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def turned(weight: Tensor, groups: int) -> Tensor:
    """Turn the kernel of a transposed convolution into rows of outputs, or back.

    Args:
        weight: (groups * a, b, ...).
        groups: how many the layer has.

    Returns:
        (groups * b, a, ...).

    Example:
        >>> import torch
        >>> layer = nn.ConvTranspose1d(4, 6, 3, groups=2)
        >>> turned(layer.weight, 2).shape
        torch.Size([6, 2, 3])
    """
    rows: Tensor = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return rows


def rows_of_outputs(layer: nn.Module) -> Tensor:
    """Return the kernel of a linear layer, (outputs, inputs per group, ...)."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    weight = weight.detach()
    return turned(weight, layer.groups) if isinstance(layer, TRANSPOSED) else weight
