"""How close images are to the true ones, and losses that make them so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Similarity:
    """How close images are to the true ones, means over images.

    Attributes:
        psnr: of each image, in dB, for values in [0, 1] (peak 1).
        ssim: 11 x 11 Gaussian window of deviation 1.5, peak 1.
    """

    psnr: float
    ssim: float


def similarity(found: Tensor, images: Tensor) -> Similarity:
    """Compare reconstructions with images, (N, C, H, W) in [0, 1].

    Raises:
        ImportError: if torchmetrics is missing.

    Example:
        >>> import torch
        >>> x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        >>> similarity((x + 0.1).clamp(0, 1), x).psnr > 19
        True
    """
    found = found.clamp(0, 1)
    window = min(11, images.shape[-1] // 2 * 2 - 1, images.shape[-2] // 2 * 2 - 1)
    ssim = _ssim()(found, images, data_range=1.0, sigma=1.5 * window / 11, kernel_size=window)
    return Similarity(psnr(found, images), float(ssim))


def psnr(found: Tensor, images: Tensor) -> float:
    """Return the mean over images of the PSNR in dB, peak 1."""
    error = (found.clamp(0, 1) - images).square().flatten(1).mean(1).clamp_min(1e-10)
    return float(-10 * error.log10().mean())


def _dissimilarity(found: Tensor, images: Tensor) -> Tensor:
    window = min(7, images.shape[-1] // 2 * 2 - 1, images.shape[-2] // 2 * 2 - 1)
    ssim = _ssim()(found, images, data_range=1.0, sigma=1.0, kernel_size=window)
    loss: Tensor = 1 - ssim + F.l1_loss(found, images)
    return loss


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squared error": F.mse_loss,
    "absolute error": F.l1_loss,
    "structure": _dissimilarity,
}


def _ssim() -> Any:
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise ImportError("SSIM needs torchmetrics: pip install 'prifu_plugin[audit]'") from error
    return structural_similarity_index_measure
