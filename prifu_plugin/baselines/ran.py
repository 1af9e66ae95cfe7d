"""Reconstructive adversarial network (Liu et al., arXiv 1901.08730)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from prifu_plugin.audit.decoders import decoder
from prifu_plugin.baselines.base import Batch, Defence
from prifu_plugin.baselines.opponents import Opponent


class RAN(Defence):
    """Play against a decoder of the images.

    E, C minimize CE(C(z), y) - strength * min(MSE(R(z), x) / variance, 1); R minimizes
    MSE(R(z), x). No code and no schedule were published; this is the objective its abstract
    states. Variance is the error of the batch's mean image: an edge that is paid for more than
    that only learns to invert the picture, which a fresh decoder undoes.
    """

    def opponents(self, z: Tensor, images: Tensor, classes: int) -> None:
        """Build R."""
        self.adversary = Opponent(decoder(z.shape[1:], tuple(images.shape[1:])).to(z.device), 1)

    def play(self, z: Tensor, batch: Batch) -> None:
        """Train R on this batch."""
        self.adversary.learn_images(z, batch.images)

    def loss(self, z: Tensor, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Return CE(C(z), y) - strength * min(MSE(R(z), x) / variance, 1)."""
        task = F.cross_entropy(self.cloud(z), batch.task)
        share = unexplained(self.adversary(z), batch.images)
        loss = task - self.pressure() * share.clamp(max=1)
        return loss, {"task": float(task.detach()), "unexplained": float(share.detach())}


def unexplained(found: Tensor, images: Tensor) -> Tensor:
    """Return the squared error of a reconstruction over that of the batch's mean image."""
    variance = (images - images.mean(0)).square().mean()
    return F.mse_loss(found, images) / variance.clamp_min(1e-6)
