"""What an audit is run on: images with labels, in parts that share nothing."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
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
    """

    images: Tensor
    labels: Labels

    def __len__(self) -> int:
        return len(self.images)

    def at(self, index: Tensor) -> AuditData:
        """Return the items at some indices."""
        return AuditData(self.images[index], {k: v[index] for k, v in self.labels.items()})


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


def integers(data: AuditData) -> AuditData:
    """Return the data on the CPU, with labels of type int64."""
    labels = {name: label.cpu().long() for name, label in data.labels.items()}
    return AuditData(data.images.cpu(), labels)


def check_disjoint(train: AuditData, test: AuditData) -> None:
    """Raise ConfigError if an image is in both parts, by content, or nearly."""
    shared = set(_digests(train.images)) & set(_digests(test.images))
    if shared:
        raise ConfigError(
            f"{len(shared)} images are in train and in test: an attacker that remembers them "
            "would be taken for one that reads them. Split by image, or by person."
        )
    near, looked_at = _near_duplicates(train.images, test.images)
    if near:
        raise ConfigError(
            f"{near} of {looked_at} test images are almost the same as one of train: remove "
            "copies that differ by rounding or compression."
        )


def split_off(
    data: AuditData, share: float, seed: int, alike: Sequence[str] = ()
) -> tuple[AuditData, AuditData]:
    """Split data at random; the second part has the share. Copies of an image stay together.

    Args:
        data: what to split.
        share: of the items that go into the second part.
        seed: of the order.
        alike: labels of which each class shall be in both parts, where it has two images.
    """
    copies = _copies(data.images)
    if len(copies) < len(data):
        warnings.warn(
            f"{len(data) - len(copies)} of {len(data)} images of train are copies of others: "
            "attackers learn from them what they know already. Pass each image once.",
            PrifuWarning,
            stacklevel=4,
        )
    order = torch.randperm(len(copies), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen, rest, count = [], [], 0
    for group in (copies[i] for i in order):
        if count + len(group) <= int(len(data) * share):
            chosen.append(group)
            count += len(group)
        else:
            rest.append(group)
    for name in alike:
        label = data.labels[name].tolist()
        for wanting, giving in ((chosen, rest), (rest, chosen)):
            there = {label[i] for group in wanting for i in group}
            for value in sorted({label[i] for group in giving for i in group} - there):
                members = [group for group in giving if label[group[0]] == value]
                if len(members) > 1:
                    wanting.append(members[0])
                    giving.remove(members[0])
    parts = (torch.tensor([i for group in part for i in group]) for part in (rest, chosen))
    first, second = (data.at(index) for index in parts)
    return first, second


def _copies(images: Tensor) -> list[list[int]]:
    """Return the places of each image, first come first."""
    places: dict[bytes, list[int]] = {}
    for place, digest in enumerate(_digests(images)):
        places.setdefault(digest, []).append(place)
    return list(places.values())


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


def _near_duplicates(train: Tensor, test: Tensor) -> tuple[int, int]:
    """Count test images that are far nearer to one of train than images of train are.

    Returns:
        How many, and of how many that were looked at, which are at most `LOOKED_AT`.
    """
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:LOOKED_AT]
    known, asked = _small(train), _small(test[order])
    half = min(300, len(known) // 2)
    usual = torch.cdist(known[:half], known[half : 2 * half]).amin(1).median()
    if usual == 0:
        return 0, len(asked)
    exact = "donot_use_mm_for_euclid_dist"
    parts = (torch.cdist(asked, part, compute_mode=exact).amin(1) for part in known.split(4000))
    nearest = torch.stack(list(parts)).amin(0)
    close = 0.05 if _is_image(train) else 1e-3  # of few numbers, some are near by chance
    return int((nearest < close * usual).sum()), len(asked)


LOOKED_AT = 1000
"""Test images that are compared with all of train."""


def _small(images: Tensor) -> Tensor:
    """Return images as 8 x 8 means, in which rounding and compression hardly show."""
    values = images.float() / (1 if images.is_floating_point() else 255)
    return (F.adaptive_avg_pool2d(values, 8) if _is_image(images) else values).flatten(1)


def _is_image(images: Tensor) -> bool:
    return images.ndim == 4 and min(images.shape[2:]) >= 8


def fingerprint(*parts: AuditData) -> str:
    """Return a digest of images and labels in their order, by which audits know their data."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(_bytes(part.images))
        for name in sorted(part.labels):
            digest.update(name.encode() + part.labels[name].cpu().long().numpy().tobytes())
    return digest.hexdigest()


def _digests(images: Tensor) -> list[bytes]:
    return [hashlib.blake2b(_bytes(image), digest_size=16).digest() for image in images]


def _bytes(x: Tensor) -> bytes:
    """Return what a tensor holds, of types that numpy does not know too."""
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
