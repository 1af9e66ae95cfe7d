"""CelebA in the paper's setting: smiling is the task; sex is private, age is never named."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from prifu_plugin.audit.data import AuditData
from prifu_plugin.data.pictures import read_pictures
from prifu_plugin.errors import ConfigError

PARTS = {"train": 0, "validation": 1, "test": 2}
TASK, PRIVATE = "Smiling", ("Male", "Young")


def load_celeba(
    folder: str | Path,
    part: str,
    *,
    attributes: tuple[str, ...] = (TASK, *PRIVATE),
    size: int = 128,
    most: int | None = None,
) -> AuditData:
    """Read a part of the official split of CelebA, which shares no person with the others.

    Args:
        folder: with list_attr_celeba.txt, list_eval_partition.txt and img_align_celeba/.
        part: "train", "validation" or "test".
        attributes: names of official attributes; each is a label of classes 0 and 1.
        size: images are cropped to the face's square and scaled to this many pixels a side.
        most: how many at most, the first of the official order.

    Returns:
        Images (N, 3, size, size) in [0, 1], labels, and persons as groups where the folder holds
        identity_CelebA.txt.

    Raises:
        ConfigError: if a file or attribute is missing, or lists disagree.
        ImportError: if Pillow is missing.
    """
    folder = Path(folder)
    if part not in PARTS:
        raise ConfigError(f"part='{part}': choose one of {', '.join(PARTS)}.")
    lines = _lines(folder / "list_attr_celeba.txt")
    if len(lines) < 3 or not lines[0].strip().isdigit():
        raise ConfigError(f"{folder / 'list_attr_celeba.txt'} is cut off or not the official file.")
    names, rows = lines[1].split(), [line.split() for line in lines[2:] if line.strip()]
    unknown = [name for name in attributes if name not in names]
    if unknown:
        raise ConfigError(f"CelebA has no attribute '{unknown[0]}'; it has {', '.join(names)}.")
    places = dict(line.split() for line in _lines(folder / "list_eval_partition.txt") if line)
    if len(rows) != int(lines[0]) or any(len(row) != len(names) + 1 for row in rows):
        raise ConfigError(f"{folder / 'list_attr_celeba.txt'} is cut off or not the official file.")
    chosen = [row for row in rows if places.get(row[0]) == str(PARTS[part])][:most]
    if not chosen:
        raise ConfigError(f"No image of {folder} is in the part '{part}'.")
    files = [folder / "img_align_celeba" / row[0] for row in chosen]
    labels = {
        name: torch.tensor([int(row[1 + names.index(name)]) > 0 for row in chosen]).long()
        for name in attributes
    }
    return AuditData(read_pictures(files, size), labels, _persons(folder, [r[0] for r in chosen]))


def _persons(folder: Path, names: list[str]) -> Tensor | None:
    """Return whom each image shows, if the list is there: it is given out on request only."""
    file = folder / "identity_CelebA.txt"
    if not file.exists():
        return None
    known = dict(line.split() for line in _lines(file) if line.strip())
    missing = [name for name in names if name not in known]
    if missing:
        raise ConfigError(f"{file} does not name {missing[0]}: it is cut off, or of other images.")
    return torch.tensor([int(known[name]) for name in names])


def _lines(file: Path) -> list[str]:
    if not file.exists():
        raise ConfigError(
            f"{file} is missing: take the aligned images and the lists from "
            "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html."
        )
    return file.read_text().splitlines()
