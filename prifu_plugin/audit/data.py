"""What an audit is run on: images with labels, in parts that share nothing."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prifu_plugin.errors import ConfigError

Labels = dict[str, Tensor]


@dataclass(frozen=True)
class AuditData:
    """Inputs of the edge, and what is known of each.

    Attributes:
        images: (N, ...), as the edge takes them.
        labels: name -> classes (N,), integers from 0.
    """

    images: Tensor
    labels: Labels

    def __len__(self) -> int:
        return len(self.images)

    def at(self, index: Tensor) -> AuditData:
        """Return the items at some indices."""
        return AuditData(self.images[index], {k: v[index] for k, v in self.labels.items()})


def check_labels(data: AuditData, names: list[str], where: str) -> None:
    """Raise ConfigError unless every label is there, integer, and one a sample."""
    for name in names:
        if name not in data.labels:
            raise ConfigError(
                f"{where} has no label '{name}'; it has {', '.join(data.labels) or 'none'}."
            )
        label = data.labels[name]
        if label.shape != (len(data),):
            raise ConfigError(
                f"Label '{name}' of {where} has shape {tuple(label.shape)} for {len(data)} images:"
                f" pass one class an image, ({len(data)},)."
            )
        if label.is_floating_point() or int(label.min()) < 0:
            raise ConfigError(f"Label '{name}' of {where} must be integers from 0.")


def check_disjoint(train: AuditData, test: AuditData) -> None:
    """Raise ConfigError if an image is in both parts, by content."""
    shared = _digests(train.images) & _digests(test.images)
    if shared:
        raise ConfigError(
            f"{len(shared)} images are in train and in test: an attacker that remembers them "
            "would be taken for one that reads them. Split by image, or by person."
        )


def split_off(data: AuditData, share: float, seed: int) -> tuple[AuditData, AuditData]:
    """Split data at random; the second part has the share."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    count = int(len(data) * share)
    return data.at(order[count:]), data.at(order[:count])


def uploads(edge: nn.Module, images: Tensor, what: str, batch: int = 250) -> Tensor:
    """Run the edge over images, in batches, with a progress bar; uploads come back on the CPU.

    Raises:
        ConfigError: if an upload is not one finite tensor.
    """
    parameters = next(edge.parameters(), torch.zeros(()))
    found = []
    bar = tqdm(images.split(batch), desc=what, leave=False, disable=None)
    with torch.no_grad():
        for part in bar:
            z = edge(part.to(parameters.device))
            if not isinstance(z, Tensor):
                raise ConfigError(
                    f"The edge returns {type(z).__name__}: audit one tensor at a time."
                )
            found.append(z.detach().float().cpu())
    z = torch.cat(found)
    if not torch.isfinite(z).all():
        raise ConfigError(
            f"{int((~torch.isfinite(z)).sum())} values of the uploads are NaN or infinite: "
            "the edge is broken for these images."
        )
    return z


def _digests(images: Tensor) -> set[bytes]:
    raw = images.detach().cpu().contiguous()
    return {hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest() for image in raw}
