"""Shredder (Mireshghallah et al., ASPLOS 2020): noise that a frozen network does not mind."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prifu_plugin.baselines.base import Batch, Defence

TENSORS = 8
"""Noise tensors that are learned, to fit a distribution to."""


class LaplaceNoise(nn.Module):
    """Add a fresh draw from a Laplace distribution of each value's own centre and scale.

    Args:
        centre: of the noise, shape of one upload.
        scale: likewise.
    """

    centre: Tensor
    scale: Tensor

    def __init__(self, centre: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("centre", centre)
        self.register_buffer("scale", scale)

    def forward(self, z: Tensor) -> Tensor:
        """Return the noisy upload."""
        uniform = torch.rand_like(z) - 0.5
        # log1p of a number above -1: the end of the interval itself would give infinity.
        tail = torch.log1p(-2 * uniform.abs().clamp(max=0.5 - 1e-7))
        return z + self.centre - self.scale * uniform.sign() * tail


class Shredder(Defence):
    """Train for the task; then freeze, and learn additive noise that keeps it.

    Each of several tensors n minimizes CE(C(z + n), y) - strength * mean abs(n) / spread, spread
    the mean absolute deviation of z.

    A distribution is fitted to the tensors, value by value, and drawn from anew for each upload.
    The weight of the noise is in units of z's spread, so that it means the same at every cut.
    """

    takes_tokens = True

    def finish(self, batches: list[Batch]) -> None:
        """Learn the noise."""
        uploads = [self.encode(batch.images) for batch in batches]
        spread = float((uploads[0] - uploads[0].mean(0)).abs().mean()) + 1e-12
        cloud = self.cloud.eval().requires_grad_(False)
        found = [self._learn(cloud, uploads, batches, spread, seed) for seed in range(TENSORS)]
        pool = torch.stack(found)
        centre = pool.median(0).values
        scale = (pool - centre).abs().mean(0)
        cloud.requires_grad_(True)
        self.edge = nn.Sequential(self.edge, LaplaceNoise(centre, scale))

    def _learn(
        self,
        cloud: nn.Module,
        uploads: list[Tensor],
        batches: list[Batch],
        spread: float,
        seed: int,
    ) -> Tensor:
        chance = torch.Generator().manual_seed(seed)
        uniform = torch.rand(uploads[0].shape[1:], generator=chance) - 0.5
        start = -spread * uniform.sign() * torch.log1p(-2 * uniform.abs().clamp(max=0.4999))
        noise = start.to(uploads[0].device).requires_grad_()
        optimizer = torch.optim.Adam([noise], lr=0.05 * spread)
        for z, batch in zip(uploads, batches, strict=True):
            optimizer.zero_grad()
            task = F.cross_entropy(cloud(z + noise), batch.task)
            (task - self.strength * noise.abs().mean() / spread).backward()
            optimizer.step()
        return noise.detach()
