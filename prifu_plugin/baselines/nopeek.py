"""NoPeek-Infer (Vepakomma et al., FG 2021): less distance correlation with the image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prifu_plugin.baselines.base import Batch, Defence


class NoPeekInfer(Defence):
    """Minimize CE(C(z), y) + strength * dCor(x, z) (section III there).

    The correlation is the bias-corrected one of Szekely and Rizzo (2014): the plain estimate of a
    batch of 64 is near 1 for independent images, so that its gradient is mostly about nothing.
    """

    takes_tokens = True

    def loss(self, z: Tensor, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Return CE(C(z), y) + strength * dCor(x, z)."""
        task = F.cross_entropy(self.cloud(z), batch.task)
        correlation = distance_correlation(batch.images.flatten(1), z.flatten(1))
        terms = {"task": float(task.detach()), "correlation": float(correlation.detach())}
        return task + self.pressure() * correlation, terms


def distance_correlation(x: Tensor, z: Tensor) -> Tensor:
    """Return the squared distance correlation of two samples, bias-corrected.

    About 0, and below it half of the time, if they are independent; 1 if one is the other.

    Args:
        x: (N, p), N of 4 or more.
        z: (N, q).

    Example:
        >>> x = torch.randn(64, 20, generator=torch.Generator().manual_seed(0))
        >>> round(float(distance_correlation(x, 2 * x)), 4)
        1.0
    """
    a, b = _centred(x), _centred(z)
    size = ((a * a).sum() * (b * b).sum()).clamp_min(1e-20).sqrt()
    return (a * b).sum() / size


def _centred(x: Tensor) -> Tensor:
    """Return distances, U-centred: rows sum to 0 and the diagonal is left out."""
    count = len(x)
    # The matrix-product form of cdist loses small distances, and their gradients, to rounding.
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    rows = distance.sum(1, keepdim=True) / (count - 2)
    centred = distance - rows - rows.T + distance.sum() / ((count - 1) * (count - 2))
    return centred.masked_fill(torch.eye(count, dtype=torch.bool, device=x.device), 0)
