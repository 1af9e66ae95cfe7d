"""The variational information bottleneck (Alemi et al., ICLR 2017): less of everything."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prifu_plugin.baselines.base import Batch, Defence
from prifu_plugin.errors import OrderError


class Sampler(nn.Module):
    """Add Gaussian noise of one learned variance: z ~ N(mu, exp(log_variance)).

    Drawn in training and at inference. The published code of CFB adds the logarithm of the
    variance to unit noise, which is a shift; this is the reparametrization that was meant.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.tensor(-2.0))

    def forward(self, mean: Tensor) -> Tensor:
        """Return a sample."""
        return mean + (0.5 * self.bounded()).exp() * torch.randn_like(mean)

    def bounded(self) -> Tensor:
        """Return the logarithm of the variance, between -8 and 4."""
        return self.log_variance.clamp(-8, 4)

    def divergence(self, mean: Tensor) -> Tensor:
        """Return KL(N(mean, variance) || N(0, 1)), summed over z, mean over the batch; nats."""
        log = self.bounded()
        each = 0.5 * (mean.square() + log.exp() - log - 1)
        return each.flatten(1).sum(1).mean()


class VIB(Defence):
    """Minimize CE(C(z), y) + strength * KL(p(z | x) || N(0, 1)): an upper bound of I(X; Z).

    Nobody's label is named and nobody is played against: the control that any filter must beat.

    Args:
        edge: images -> upload.
        cloud: upload -> logits.
        channels: of the given upload.
        spatial: whether it is (N, C, H, W).
        width: channels of the new upload.
        strength: weight of a nat.
    """

    def __init__(
        self,
        edge: nn.Module,
        cloud: nn.Module,
        *,
        channels: int,
        spatial: bool,
        width: int = 32,
        strength: float = 1e-3,
    ) -> None:
        super().__init__(edge, cloud, strength=strength)
        self.sampler = Sampler()
        self.mean = nn.Sequential(edge, pointwise(channels, width, spatial=spatial))
        self.edge = nn.Sequential(self.mean, self.sampler)
        self.enter = pointwise(width, channels, spatial=spatial)
        self.behind = cloud
        self.cloud = nn.Sequential(self.enter, self.behind)
        self.channels = channels

    def step(self, batch: Batch) -> dict[str, float]:
        """Train on one batch."""
        if self.optimizer is None:
            raise OrderError(f"{type(self).__name__}.step before begin: train with baselines.fit.")
        mean = self.mean(batch.images)
        task = F.cross_entropy(self.answer(self.sampler(mean), batch), batch.task)
        nats = self.sampler.divergence(mean)
        self.optimizer.zero_grad()
        (task + self.pressure() * nats).backward()
        self.optimizer.step()
        return {"task": float(task.detach()), "nats": float(nats.detach())}

    def answer(self, z: Tensor, batch: Batch) -> Tensor:
        """Return the cloud's logits in training."""
        logits: Tensor = self.cloud(z)
        return logits


def pointwise(inputs: int, outputs: int, *, spatial: bool) -> nn.Module:
    """Return a linear map of channels, the same at every position, that begins as a rotation.

    torch's own start takes most of the scale of a narrow map's input away, and a network cut there
    does not always learn.
    """
    layer = nn.Conv2d(inputs, outputs, 1) if spatial else nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer
