"""Conditional fairness bottleneck (Rodriguez-Galvez et al., ITW 2021; arXiv 2006.06332)."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prifu_plugin.baselines.base import Batch
from prifu_plugin.baselines.vib import VIB


class CFB(VIB):
    """Tell the cloud the private label in training, so that z has no need to carry it.

    Minimizes strength * I_ub(X; Z) + H_ub(T | S, Z) (their Eq. 6 divided by beta): the divergence
    of `VIB`, in nats, and the task's cross-entropy given z and s. At inference nobody knows s: the
    cloud goes on with what the label adds on average, and is trained on frozen, sampled uploads
    without it. Means over the batch, where the published code sums.

    Arguments are those of `VIB`.
    """

    needs_private: ClassVar[bool] = True

    def opponents(self, z: Tensor, images: Tensor, classes: int) -> None:
        """Note the number of classes: there is no opponent."""
        self.classes = classes

    def begin(self, batch: Batch, classes: int, optimizer: torch.optim.Optimizer) -> None:
        """Build the map that is told the label."""
        super().begin(batch, classes, optimizer)
        self.told = nn.Linear(classes, self.channels).to(batch.images.device)
        optimizer.add_param_group({"params": list(self.told.parameters())})

    def answer(self, z: Tensor, batch: Batch) -> Tensor:
        """Return the cloud's logits given the upload and the private label."""
        assert batch.private is not None
        told = self.told(F.one_hot(batch.private, self.classes).float())
        seen = self.enter(z)
        logits: Tensor = self.behind(seen + told.reshape(*told.shape, *[1] * (seen.ndim - 2)))
        return logits

    def finish(self, batches: list[Batch]) -> None:
        """Train a cloud that is not told the label, on frozen uploads."""
        share = self._shares(batches)
        with torch.no_grad():
            assert isinstance(self.enter.bias, Tensor)
            self.enter.bias += self.told(share)
        self.cloud.train()
        optimizer = torch.optim.Adam(self.cloud.parameters(), lr=1e-3)
        for batch in batches:
            z = self.encode(batch.images)
            optimizer.zero_grad()
            F.cross_entropy(self.cloud(z), batch.task).backward()
            optimizer.step()

    def _shares(self, batches: list[Batch]) -> Tensor:
        named = torch.cat([batch.private for batch in batches if batch.private is not None])
        return named.bincount(minlength=self.classes).float() / len(named)
