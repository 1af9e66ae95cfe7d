"""Search for images whose uploads are those that were seen, by the edge's own gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prifu_plugin.audit.preparation import WIDE, standardize, whiten
from prifu_plugin.audit.similarity import psnr


def searched(
    edge: Callable[[Tensor], Tensor],
    z: Tensor,
    known: tuple[Tensor, Tensor],
    target: Tensor,
    mean: Tensor,
    seed: int,
) -> Tensor:
    """Find images, (n, C, H, W) in [0, 1], for uploads.

    Args:
        edge: differentiable, images -> uploads.
        z: uploads whose scales and directions are known, (N, ...).
        known: a few uploads and their images, on which it is chosen what counts.
        target: the uploads to find images for, (n, ...).
        mean: image to begin with, (1, C, H, W).
        seed: of the start.
    """
    return _search(edge, z, target, mean, seed, _tolerance(edge, z, known, mean, seed))


def _tolerance(
    edge: Callable[[Tensor], Tensor],
    z: Tensor,
    known: tuple[Tensor, Tensor],
    mean: Tensor,
    seed: int,
) -> float:
    """Choose on images the attacker has which directions count: below are rounding and noise."""
    found = {
        tolerance: psnr(_search(edge, z, known[0], mean, seed, tolerance), known[1])
        for tolerance in (1e-3, 1e-2, 1e-1)
    }
    return max(found, key=lambda tolerance: found[tolerance])


def _search(
    edge: Callable[[Tensor], Tensor],
    z: Tensor,
    target: Tensor,
    mean: Tensor,
    seed: int,
    tolerance: float,
) -> Tensor:
    """Find images whose whitened uploads are near, and that have little total variation."""
    # Directions that images hardly reach would drown the others in their gradients.
    flat = z.flatten(1)
    direct = whiten(flat, tolerance=tolerance) if flat.shape[1] <= WIDE else standardize(flat)

    def fitted(x: Tensor) -> Tensor:
        return direct(x.flatten(1))

    goal = fitted(target)
    if not goal.numel():
        return mean.expand(len(target), -1, -1, -1)
    generator = torch.Generator().manual_seed(seed)
    start = mean.expand(len(target), -1, -1, -1)
    start = start + 0.05 * torch.randn(start.shape, generator=generator)
    raw = torch.logit(start.clamp(0.02, 0.98)).requires_grad_()
    optimizer = torch.optim.Adam([raw], lr=0.05)
    with torch.enable_grad():
        for _ in range(200):
            optimizer.zero_grad()
            images = raw.sigmoid()
            distance = (fitted(edge(images)) - goal).square().mean()
            rough = images.diff(dim=2).abs().mean() + images.diff(dim=3).abs().mean()
            # Not backward(), which would leave gradients on the edge's parameters.
            (raw.grad,) = torch.autograd.grad(distance + 0.05 * rough, raw)
            optimizer.step()
    return raw.detach().sigmoid()
