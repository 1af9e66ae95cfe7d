"""Privacy adversarial network (Liu et al., IMWUT 2019; arXiv 2006.06535)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from prifu_plugin.audit.decoders import decoder
from prifu_plugin.baselines.base import Batch, Defence
from prifu_plugin.baselines.opponents import Opponent, classifier
from prifu_plugin.baselines.ran import unexplained


class PAN(Defence):
    """Play against a classifier of the private label and a decoder of the images at once.

    E, C minimize CE(C(z), y) - strength * (min(CE(D(z), s), log K) / log K
    + min(MSE(R(z), x) / variance, 1)) / 2; D and R learn before each of the edge's turns. No
    official code exists; the two adversaries are those its abstract names. Both terms are capped
    at chance, as in `CI` and `RAN`, and in units of it, so that one weight serves both.
    """

    needs_private: ClassVar[bool] = True

    def opponents(self, z: Tensor, images: Tensor, classes: int) -> None:
        """Build D and R."""
        self.chance = math.log(classes)
        self.adversary = Opponent(classifier(z, classes))
        self.decoder = Opponent(decoder(z.shape[1:], tuple(images.shape[1:])).to(z.device), 1)

    def play(self, z: Tensor, batch: Batch) -> None:
        """Train D and R on this batch."""
        assert batch.private is not None
        self.adversary.learn_label(z, batch.private)
        self.decoder.learn_images(z, batch.images)

    def loss(self, z: Tensor, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Return the task's loss minus half of strength times each capped term."""
        assert batch.private is not None
        task = F.cross_entropy(self.cloud(z), batch.task)
        read = F.cross_entropy(self.adversary(z), batch.private) / self.chance
        share = unexplained(self.decoder(z), batch.images)
        hidden = (read.clamp(max=1) + share.clamp(max=1)) / 2
        terms = {"task": task, "adversary": read, "unexplained": share}
        return task - self.pressure() * hidden, {k: float(v.detach()) for k, v in terms.items()}
