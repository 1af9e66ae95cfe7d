"""Controllable invariance (Xie et al., NeurIPS 2017)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from prifu_plugin.baselines.base import Batch, Defence
from prifu_plugin.baselines.opponents import Opponent, classifier


class CI(Defence):
    """Play against a classifier of the private label: min over E, C, max over D.

    E, C minimize CE(C(z), y) - strength * min(CE(D(z), s), log K); D minimizes CE(D(z), s)
    (the minimax game of section 3 there, for an edge that is not told s). The cap at chance is a
    guard of ours: beyond it the edge would make D confidently wrong, which a fresh attacker
    inverts.
    """

    needs_private: ClassVar[bool] = True
    takes_tokens = True

    def opponents(self, z: Tensor, images: Tensor, classes: int) -> None:
        """Build D."""
        self.chance = math.log(classes)
        self.adversary = Opponent(classifier(z, classes))

    def play(self, z: Tensor, batch: Batch) -> None:
        """Train D on this batch."""
        assert batch.private is not None
        self.adversary.learn_label(z, batch.private)

    def loss(self, z: Tensor, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Return CE(C(z), y) - strength * min(CE(D(z), s), log K)."""
        assert batch.private is not None
        task = F.cross_entropy(self.cloud(z), batch.task)
        read = F.cross_entropy(self.adversary(z), batch.private)
        loss = task - self.pressure() * read.clamp(max=self.chance)
        return loss, {"task": float(task.detach()), "adversary": float(read.detach())}
