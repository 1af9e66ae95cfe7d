"""Maximum-entropy adversarial representation learning (Roy and Boddeti, CVPR 2019)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from prifu_plugin.baselines.base import Batch
from prifu_plugin.baselines.ci import CI


class MaxEntARL(CI):
    """Make a classifier of the private label uncertain, not wrong: a game that is not zero-sum.

    E, C minimize CE(C(z), y) + strength * (log K - H(D(z))), H the mean entropy of D's answers;
    D minimizes CE(D(z), s) as in `CI` (Eq. 4 and 5 there). Entropy is bounded by log K, so the
    term is too. D's answers go through log_softmax, where the published code adds 1e-16 to
    probabilities.
    """

    takes_tokens = True

    def loss(self, z: Tensor, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Return CE(C(z), y) + strength * (log K - H(D(z)))."""
        task = F.cross_entropy(self.cloud(z), batch.task)
        said = F.log_softmax(self.adversary(z), 1)
        entropy = -(said.exp() * said).sum(1).mean()
        loss = task + self.pressure() * (self.chance - entropy)
        return loss, {"task": float(task.detach()), "entropy": float(entropy.detach())}
