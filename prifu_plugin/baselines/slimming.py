"""Network slimming (Liu et al., ICCV 2017): sparsity on the norms' own scales."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prifu_plugin.baselines.base import Batch, Defence
from prifu_plugin.errors import ConfigError
from prifu_plugin.graph.norms import is_norm


class NetworkSlimming(Defence):
    """Minimize CE(C(z), y) + strength * sum abs(gamma), then zero the smallest and fine-tune.

    The closest relative of a filter: the threshold is one for the whole network, the penalty an L1
    norm, and what is penalized is the scale the norm has anyway.

    Args:
        edge: images -> upload.
        cloud: upload -> logits.
        strength: weight of the L1 norm.
        remove: share of all norm channels that is zeroed after training.
    """

    takes_tokens = True

    def __init__(
        self, edge: nn.Module, cloud: nn.Module, *, strength: float = 1e-4, remove: float = 0.5
    ) -> None:
        super().__init__(edge, cloud, strength=strength)
        if not 0 <= remove < 1:
            raise ConfigError(f"remove={remove}: a share in [0, 1).")
        modules: dict[Any, None] = dict.fromkeys(
            [*edge.modules(), *cloud.modules()]
        )  # each once, in order
        self.norms = [m for m in modules if is_norm(m) and _gamma(m) is not None]
        if not self.norms:
            raise ConfigError("NetworkSlimming needs norms with a scale of their own.")
        self.remove = remove

    def loss(self, z: Tensor, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Return CE(C(z), y) + strength * sum abs(gamma)."""
        task = F.cross_entropy(self.cloud(z), batch.task)
        size = torch.stack([norm.weight.abs().sum() for norm in self.norms]).sum()
        terms = {"task": float(task.detach()), "gamma": float(size.detach())}
        return task + self.pressure() * size, terms

    @torch.no_grad()
    def finish(self, batches: list[Batch]) -> None:
        """Zero the channels of the smallest scales, keep one a layer, and fine-tune the rest."""
        scales = torch.cat([norm.weight.abs() for norm in self.norms])
        least = scales.sort().values[int(len(scales) * self.remove)]
        sizes = [norm.weight.abs() for norm in self.norms]
        kept = [size >= torch.minimum(least, size.max()) for size in sizes]
        optimizer = torch.optim.SGD(self.defenders(), lr=0.01, momentum=0.9)
        self.train()
        for batch in batches:
            self._zero(kept)
            with torch.enable_grad():
                optimizer.zero_grad()
                F.cross_entropy(self.cloud(self.edge(batch.images)), batch.task).backward()
            optimizer.step()
        self._zero(kept)

    def _zero(self, kept: list[Tensor]) -> None:
        for norm, keep in zip(self.norms, kept, strict=True):
            norm.weight.mul_(keep)
            if getattr(norm, "bias", None) is not None:
                norm.bias.mul_(keep)


def _gamma(norm: nn.Module) -> Tensor | None:
    weight: Tensor | None = getattr(norm, "weight", None)
    return weight
