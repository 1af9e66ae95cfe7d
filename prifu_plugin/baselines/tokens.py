"""Uploads of tokens, for methods that expect channels behind the batch."""

from __future__ import annotations

from torch import Tensor, nn


def tokens_as_maps(edge: nn.Module, cloud: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Let an edge that uploads tokens (N, T, C) upload maps (N, C, T, 1), and the cloud take them.

    The numbers are the same, in another order; every method of this package takes maps.

    Args:
        edge: images -> tokens.
        cloud: tokens -> logits.

    Returns:
        Edge and cloud, which hold the given ones.

    Example:
        >>> import torch
        >>> edge, cloud = tokens_as_maps(nn.Identity(), nn.Flatten())
        >>> z = edge(torch.ones(2, 5, 3))
        >>> z.shape, cloud(z).shape
        (torch.Size([2, 3, 5, 1]), torch.Size([2, 15]))
    """
    return nn.Sequential(edge, _ToMaps()), nn.Sequential(_ToTokens(), cloud)


class _ToMaps(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z.transpose(1, 2).unsqueeze(-1)


class _ToTokens(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z.squeeze(-1).transpose(1, 2)
