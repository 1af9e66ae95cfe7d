"""Parts of data that share nothing: no image, no copy, no person."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
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
        alike: labels of which each class must be in both parts.

    Raises:
        ConfigError: if copies and groups bind so many images that a part has none of a class.
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
    _even_out(chosen, rest, data, alike)
    parts = (torch.tensor([i for group in part for i in group]) for part in (rest, chosen))
    first, second = (data.at(index) for index in parts)
    return first, second


Lists = list[list[int]]
"""Places of images that stay together."""

Kinds = dict[int, set[tuple[str, int]]]
"""First place of a list -> (label, class) of all its images."""


def _even_out(chosen: Lists, rest: Lists, data: AuditData, alike: Sequence[str]) -> None:
    """Give each part the classes it lacks, or raise ConfigError where that cannot be."""
    labels = {name: data.labels[name].tolist() for name in alike}
    kinds = {
        places[0]: {(name, label[i]) for name, label in labels.items() for i in places}
        for places in chosen + rest
    }
    for wanting, giving in ((chosen, rest), (rest, chosen)) * 2:
        _move(wanting, giving, kinds)
    both = [{kind for places in part for kind in kinds[places[0]]} for part in (chosen, rest)]
    lacking = both[0] ^ both[1]
    if lacking or not chosen or not rest:
        name, value = min(lacking, default=("", 0))
        what = f"class {value} of '{name}' is" if name else "all images are"
        raise ConfigError(
            f"The {len(data)} training images are bound by copies and groups into "
            f"{len(chosen) + len(rest)} sets, and {what} in too few of them to train attackers on "
            "some and choose them on others. Add images of others, or merge the class."
        )


def _move(wanting: Lists, giving: Lists, kinds: Kinds) -> None:
    """Move the smallest lists that hold what one part lacks, and that the other can spare."""
    there, here = (
        Counter(kind for places in part for kind in kinds[places[0]]) for part in (giving, wanting)
    )
    for kind in sorted(set(there) - set(here)):
        if here[kind]:  # it came with another
            continue
        free = [
            places
            for places in giving
            if kind in kinds[places[0]] and all(there[one] > 1 for one in kinds[places[0]])
        ]
        if free:
            moved = min(free, key=len)
            giving.remove(moved)
            wanting.append(moved)
            here.update(kinds[moved[0]])
            there.subtract(kinds[moved[0]])


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
    mixed = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(1))]
    # The fourth nearest: some of train may be there several times, rounded or compressed.
    near = torch.cdist(mixed[:half], mixed[half : 2 * half]).kthvalue(min(4, half), 1).values
    usual = near.median()
    if usual == 0:
        warnings.warn(
            "Most images of train look the same in 8 x 8 means: whether test images are copies "
            "of them cannot be told.",
            PrifuWarning,
            stacklevel=4,
        )
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
