"""Labeled Faces in the Wild with the attributes of Kumar et al.: scores, cut at zero."""

from __future__ import annotations

import collections
import hashlib
from pathlib import Path

import torch

from prifu_plugin.audit.data import AuditData
from prifu_plugin.data.pictures import read_pictures
from prifu_plugin.errors import ConfigError

TASK, PRIVATE = "Smiling", ("Pale Skin", "Youth")
TEST_SHARE = 3510 / 13145
"""The paper tests on 3,510 of 13,145 images and does not say which."""


def load_lfw(
    folder: str | Path,
    *,
    train: bool,
    attributes: tuple[str, ...] = (TASK, *PRIVATE),
    size: int = 128,
) -> AuditData:
    """Read a part of LFW; nobody is in both, and of 13,145 images 3,510 are for testing.

    Args:
        folder: with lfw_attributes.txt and the images, Name_Surname/Name_Surname_0001.jpg.
        train: the larger part, or the part for testing.
        attributes: names of official attributes; a positive score is class 1.
        size: pixels a side.

    Returns:
        Images (N, 3, size, size) in [0, 1], labels, and persons as groups.

    Raises:
        ConfigError: if a file or attribute is missing.
        ImportError: if Pillow is missing.
    """
    folder = Path(folder)
    file = folder / "lfw_attributes.txt"
    if not file.exists():
        raise ConfigError(
            f"{file} is missing: take it from https://www.cs.columbia.edu/CAVE/databases/pubfig/ "
            "(LFW attributes), and the images from the mirrors of LFW."
        )
    lines = file.read_text().splitlines()
    header = next((line for line in lines if line.startswith("#\tperson")), "")
    if not header:
        raise ConfigError(f"{file} has no line '#\tperson\t...': it is not the official file.")
    names = header.split("\t")[1:]
    unknown = [name for name in attributes if name not in names]
    if unknown:
        raise ConfigError(f"LFW has no attribute '{unknown[0]}'; it has {', '.join(names[2:])}.")
    rows = [line.split("\t") for line in lines if line and not line.startswith("#")]
    persons = [row[0] for row in rows]
    judged = _for_test(persons)
    rows = [row for row in rows if (row[0] in judged) != train]
    if not rows or any(len(row) != len(names) for row in rows):
        raise ConfigError(f"{file} is cut off, or not the official file.")
    files = []
    for person, number, *_ in rows:
        underlined = person.replace(" ", "_")
        files.append(folder / underlined / f"{underlined}_{int(number):04d}.jpg")
    labels = {
        name: torch.tensor([float(row[names.index(name)]) > 0 for row in rows]).long()
        for name in attributes
    }
    known = {person: place for place, person in enumerate(sorted(set(persons)))}
    groups = torch.tensor([known[row[0]] for row in rows])
    return AuditData(read_pictures(files, size), labels, groups)


def _for_test(persons: list[str]) -> set[str]:
    """Choose persons, in the order of a digest of their names, until their images are enough."""
    counts = collections.Counter(persons)
    left = round(TEST_SHARE * len(persons))
    chosen = set()
    for person in sorted(counts, key=lambda p: hashlib.blake2b(p.encode(), digest_size=8).digest()):
        if counts[person] <= left:
            chosen.add(person)
            left -= counts[person]
    return chosen
