"""Dynamic and invariant sensitive channel obfuscation (Singh et al., CVPR 2021)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prifu_plugin.audit.decoders import decoder
from prifu_plugin.baselines.base import Batch, Defence
from prifu_plugin.baselines.opponents import Opponent, classifier, reverse_gradient
from prifu_plugin.baselines.ran import unexplained
from prifu_plugin.errors import ConfigError, OrderError

SHARPNESS = (1.0, 30.0)
"""One over the temperature of the gate, at the start and when half of training is done."""


class Gate(nn.Module):
    """Close channels, chosen for each image: z * sigmoid((score - the k-th score) / temperature).

    The gate stays soft and is one image's own; published code flattens the indices of a batch and
    closes their union for every image, which lets no gradient through.

    Args:
        channels: of z.
        remove: share of the channels to close, in [0, 1).
    """

    def __init__(self, channels: int, remove: float) -> None:
        super().__init__()
        if not 0 <= remove < 1:
            raise ConfigError(f"remove={remove}: a share in [0, 1).")
        self.place = min(channels - 1, int(channels * remove))
        self.sharpness = SHARPNESS[1]
        self.scores = nn.Sequential(
            nn.BatchNorm1d(2 * channels), nn.Linear(2 * channels, channels), nn.ReLU(),
            nn.Linear(channels, channels),
        )  # fmt: skip

    def gate(self, z: Tensor) -> Tensor:
        """Return the gate, (N, C, ...), from what z says of itself; no gradient reaches z."""
        flat = z.detach().reshape(*z.shape[:2], -1)
        seen = torch.cat([flat.mean(2), flat.amax(2)], 1)
        scores = self.scores(seen)
        least = scores.sort(1).values[:, self.place, None]
        gate = torch.sigmoid((scores - least) * self.sharpness)
        return gate.reshape(*z.shape[:2], *[1] * (z.ndim - 2))

    def forward(self, z: Tensor) -> Tensor:
        """Return the gated upload."""
        return z * self.gate(z)


class DISCO(Defence):
    """Learn, image by image, which channels to close, against an adversary that reads the rest.

    Three parties: the adversary learns to read; the gate minimizes the task's loss minus strength
    times the adversary's; edge and cloud minimize the task's loss (section 3.2 there). One backward
    pass serves all: the adversary's gradient is reversed on its way into the gate and reaches
    nothing else. Its loss is bounded in effect, since the gate can only close channels. The
    adversary classifies the private label where one is named, and reconstructs images otherwise.

    Args:
        edge: images -> upload.
        cloud: upload -> logits.
        strength: of the adversary's share in the gate's loss.
        remove: share of the channels to close for each image.
        channels: of the upload.
    """

    def __init__(
        self,
        edge: nn.Module,
        cloud: nn.Module,
        *,
        channels: int,
        strength: float = 1.0,
        remove: float = 0.6,
    ) -> None:
        super().__init__(edge, cloud, strength=strength)
        self.extractor = edge
        self.pruner = Gate(channels, remove)
        self.edge = nn.Sequential(edge, self.pruner)

    def opponents(self, z: Tensor, images: Tensor, classes: int) -> None:
        """Build the adversary."""
        net = classifier(z, classes) if classes else decoder(z.shape[1:], tuple(images.shape[1:]))
        self.adversary = Opponent(net.to(z.device), 1)

    def step(self, batch: Batch) -> dict[str, float]:
        """Take the three parties' turn in one backward pass."""
        if self.optimizer is None:
            raise OrderError("DISCO.step before begin: train with baselines.fit.")
        first, last = SHARPNESS
        self.pruner.sharpness = first * (last / first) ** min(1.0, 2 * self.progress)
        z = self.extractor(batch.images)
        gate = self.pruner.gate(z)
        task = F.cross_entropy(self.cloud(z * gate), batch.task)
        seen = reverse_gradient(gate, self.pressure()) * z.detach()
        read = self._read(self.adversary(seen), batch)
        self.optimizer.zero_grad()
        self.adversary.optimizer.zero_grad()
        (task + read).backward()
        self.optimizer.step()
        self.adversary.optimizer.step()
        return {"task": float(task.detach()), "adversary": float(read.detach())}

    def _read(self, said: Tensor, batch: Batch) -> Tensor:
        if batch.private is None:
            return unexplained(said, batch.images)
        return F.cross_entropy(said, batch.private)
