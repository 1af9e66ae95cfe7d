"""What an audit is run on: images with labels, and what the edge makes of them."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prifu_plugin.device import device_of
from prifu_plugin.errors import ConfigError, PrifuError, PrifuWarning, first_line

Labels = dict[str, Tensor]


@dataclass(frozen=True)
class AuditData:
    """Inputs of the edge, and what is known of each.

    Attributes:
        images: (N, ...), as the edge takes them.
        labels: name -> classes (N,), integers from 0.
        groups: whom each image shows, (N,) integers, where several show the same person: they are
            kept on one side of every split, and intervals are of persons, not of images. None
            where every image stands for itself.
    """

    images: Tensor
    labels: Labels
    groups: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def at(self, index: Tensor) -> AuditData:
        """Return the items at some indices."""
        labels = {name: label[index] for name, label in self.labels.items()}
        return AuditData(
            self.images[index], labels, None if self.groups is None else self.groups[index]
        )


def check_labels(data: AuditData, names: Sequence[str], where: str) -> None:
    """Raise ConfigError unless every label is one a sample, and those named are there, integers."""
    for name in names:
        if name not in data.labels:
            raise ConfigError(
                f"{where} has no label '{name}'; it has {', '.join(data.labels) or 'none'}."
            )
    for name, label in data.labels.items():
        if not isinstance(label, Tensor):
            raise ConfigError(
                f"Label '{name}' of {where} is a {type(label).__name__}: pass torch.tensor(...)."
            )
        if label.shape != (len(data),):
            raise ConfigError(
                f"Label '{name}' of {where} has shape {tuple(label.shape)} for {len(data)} images:"
                f" pass one class an image, ({len(data)},)."
            )
        if name not in names:
            continue
        if label.is_floating_point() or label.is_complex() or not len(label):
            raise ConfigError(f"Label '{name}' of {where} must be integers from 0.")
        if int(label.min()) < 0:
            raise ConfigError(f"Label '{name}' of {where} must be integers from 0.")
        if int(label.max()) >= max(2, len(label)):
            raise ConfigError(
                f"Label '{name}' of {where} has class {int(label.max())} among {len(label)}: "
                "number the classes from 0, labels.unique(return_inverse=True)[1] over all parts."
            )


def check_groups(train: AuditData, test: AuditData) -> None:
    """Raise ConfigError unless both parts or neither say whom each image shows, by integers."""
    for data, where in ((train, "train"), (test, "test")):
        groups = data.groups
        if groups is None:
            if train.groups is not test.groups:
                raise ConfigError(
                    f"{where} has no groups and the other part has: give both, numbered alike."
                )
            continue
        if not isinstance(groups, Tensor) or groups.shape != (len(data),):
            raise ConfigError(
                f"groups of {where} must be one integer an image, a tensor of ({len(data)},)."
            )
        if groups.is_floating_point() or groups.is_complex():
            raise ConfigError(f"groups of {where} are {groups.dtype}: pass integers.")
        count = len(groups.unique())
        if count < FEWEST_GROUPS:
            raise ConfigError(
                f"{where} shows {count} groups: an attacker would learn these persons, not the "
                f"attribute. Pass images of at least {FEWEST_GROUPS}, of hundreds if you can."
            )


FEWEST_GROUPS = 20
"""Below it, a quarter of the persons is too few to choose attackers by."""


def integers(data: AuditData) -> AuditData:
    """Return the data on the CPU, with labels and groups of type int64."""
    labels = {name: label.cpu().long() for name, label in data.labels.items()}
    groups = None if data.groups is None else data.groups.cpu().long()
    return AuditData(data.images.cpu(), labels, groups)


def uploads(edge: nn.Module, images: Tensor, what: str, batch: int = 250) -> Tensor:
    """Run the edge over images, in batches, with a progress bar; uploads come back on the CPU.

    Raises:
        ConfigError: if an upload is not one finite tensor.
    """
    device = device_of(edge)
    found = []
    bar = tqdm(images.split(batch), desc=what, leave=False, disable=None)
    with torch.no_grad():
        for part in bar:
            # A copy, since an edge that begins in place would overwrite the caller's images.
            z = _upload(edge, part.to(device, copy=True))
            if not isinstance(z, Tensor):
                raise ConfigError(
                    f"The edge returns a {type(z).__name__}: let it return one tensor, of several "
                    "torch.cat([part.flatten(1) for part in parts], 1)."
                )
            found.append(_as_float(z.detach(), what).cpu())
    shapes = {tuple(z.shape[1:]) for z in found}
    if len(shapes) > 1 or found[0].ndim < 2:
        raise ConfigError(
            f"The edge returns {' and '.join(map(str, sorted(shapes)))} a sample: an audit needs "
            "(N, ...) of one shape, at least (N, 1). Flatten, pad or pool on the edge."
        )
    z = torch.cat(found)
    if not torch.isfinite(z).all():
        raise ConfigError(
            f"{int((~torch.isfinite(z)).sum())} values of the uploads are NaN or infinite: "
            "the edge is broken for these images."
        )
    return z


def _upload(edge: nn.Module, images: Tensor) -> Any:
    try:
        return edge(images)
    except PrifuError:
        raise
    except Exception as error:
        raise ConfigError(
            f"The edge refuses images of shape {tuple(images.shape)} and type {images.dtype} "
            f"({first_line(error)}). Pass AuditData with "
            "images as it takes them."
        ) from error


def _as_float(z: Tensor, what: str) -> Tensor:
    """Return fp32, which is what attackers see; refuse complex values, and say what it loses."""
    if z.is_complex():
        raise ConfigError(f"The {what} are complex: let the edge return torch.view_as_real(z).")
    single = z.float()
    if z.dtype in (torch.float64, torch.int64, torch.int32) and not torch.equal(single.to(z), z):
        warnings.warn(
            f"The {what} are {z.dtype}, attackers read them as float32: what the last bits tell "
            "is not tested. Let the edge return what is sent, z.float().",
            PrifuWarning,
            stacklevel=4,
        )
    return single


def fingerprint(*parts: AuditData) -> str:
    """Return a digest of images and labels in their order, by which audits know their data."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(content(part.images))
        for name in sorted(part.labels):
            digest.update(name.encode() + part.labels[name].cpu().long().numpy().tobytes())
        if part.groups is not None:
            digest.update(b"groups" + part.groups.cpu().long().numpy().tobytes())
    return digest.hexdigest()


def content(x: Tensor) -> bytes:
    """Return what a tensor holds, of types that numpy does not know too."""
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
