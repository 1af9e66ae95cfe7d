"""Parts of data that share nothing: no image, no copy, no person."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from prifu_plugin.audit.data import AuditData, content
from prifu_plugin.errors import ConfigError, PrifuWarning


def check_disjoint(train: AuditData, test: AuditData) -> None:
    """Raise ConfigError if an image is in both parts, by content, or nearly."""
    shared = set(_digests(train.images)) & set(_digests(test.images))
    if shared:
        raise ConfigError(
            f"{len(shared)} images are in train and in test: an attacker that remembers them "
            "would be taken for one that reads them. Split by image, or by person."
        )
    if train.groups is not None and test.groups is not None:
        both = set(train.groups.tolist()) & set(test.groups.tolist())
        if both:
            raise ConfigError(
                f"{len(both)} groups have images in train and in test, group {min(both)} for one: "
                "split by group."
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
    """Split data at random; the second part has the share. Copies and groups stay together.

    Args:
        data: what to split.
        share: of the items that go into the second part.
        seed: of the order.
        alike: labels of which each class shall be in both parts, where it has two images.
    """
    bound = _together(data)
    order = torch.randperm(len(bound), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen, rest, count = [], [], 0
    for group in (bound[i] for i in order):
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
                members = [group for group in giving if any(label[i] == value for i in group)]
                if len(members) > 1:
                    wanting.append(members[0])
                    giving.remove(members[0])
    parts = (torch.tensor([i for group in part for i in group]) for part in (rest, chosen))
    first, second = (data.at(index) for index in parts)
    return first, second


def _together(data: AuditData) -> list[list[int]]:
    """Return the places of images that belong in one part, first come first."""
    digests = _digests(data.images)
    copies = len(data) - len(set(digests))
    if copies:
        warnings.warn(
            f"{copies} of {len(data)} images of train are copies of others: "
            "attackers learn from them what they know already. Pass each image once.",
            PrifuWarning,
            stacklevel=5,
        )
    bound = _alike(digests)
    if data.groups is None:
        return bound
    first = {place: places[0] for places in bound for place in places}
    return _joined([[first[i] for i in places] for places in _alike(data.groups.tolist())], bound)


def _alike(marks: Iterable[object]) -> list[list[int]]:
    """Return the places of each mark."""
    places: dict[object, list[int]] = {}
    for place, mark in enumerate(marks):
        places.setdefault(mark, []).append(place)
    return list(places.values())


def _joined(links: list[list[int]], bound: list[list[int]]) -> list[list[int]]:
    """Join lists of places whose first members are linked, and return the larger lists."""
    root = {places[0]: places[0] for places in bound}

    def find(place: int) -> int:
        while root[place] != place:
            place = root[place]
        return place

    for link in links:
        for other in link[1:]:
            low, high = sorted((find(link[0]), find(other)))
            root[high] = low
    found: dict[int, list[int]] = {}
    for places in bound:
        found.setdefault(find(places[0]), []).extend(places)
    return list(found.values())


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


def _digests(images: Tensor) -> list[bytes]:
    return [hashlib.blake2b(content(image), digest_size=16).digest() for image in images]
