"""Noise on a standardized upload, in training and at inference: noise without a filter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prifu_plugin.baselines.base import Defence


class Noisy(nn.Module):
    """Standardize each channel and add Gaussian noise.

    Args:
        channels: of the upload.
        noise: standard deviation of the noise, the signal's being 1.
        spatial: whether uploads are (N, C, H, W).
    """

    def __init__(self, channels: int, noise: float, *, spatial: bool) -> None:
        super().__init__()
        kind = nn.BatchNorm2d if spatial else nn.BatchNorm1d
        self.norm = kind(channels, affine=False)
        self.noise = noise

    def forward(self, z: Tensor) -> Tensor:
        """Return the noisy upload."""
        x: Tensor = self.norm(z)
        return x + self.noise * torch.randn_like(x)


class TrainedNoise(Defence):
    """Train for the task with noise on the upload.

    Args:
        edge: images -> upload.
        cloud: upload -> logits.
        channels: of the upload.
        spatial: whether it is (N, C, H, W).
        noise: its standard deviation, the signal's being 1.
    """

    def __init__(
        self, edge: nn.Module, cloud: nn.Module, *, channels: int, spatial: bool, noise: float
    ) -> None:
        super().__init__(edge, cloud)
        self.edge = nn.Sequential(edge, Noisy(channels, noise, spatial=spatial))
