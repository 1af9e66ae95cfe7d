"""Read photographs as square tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from prifu_plugin.errors import ConfigError


def read_pictures(files: Sequence[Path], size: int) -> Tensor:
    """Read images, crop the middle square, and scale it.

    Args:
        files: of any format Pillow reads.
        size: pixels a side.

    Returns:
        (N, 3, size, size) in [0, 1].

    Raises:
        ConfigError: if a file is missing.
        ImportError: if Pillow is missing.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("Reading pictures needs Pillow: pip install pillow") from error
    images = torch.empty(len(files), 3, size, size)
    for place, file in enumerate(tqdm(files, desc="reading", leave=False, disable=None)):
        if not file.exists():
            raise ConfigError(f"{file} is in the list but missing: the images are incomplete.")
        with Image.open(file) as opened:
            picture = opened.convert("RGB")
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        square = picture.crop((left, top, left + side, top + side)).resize((size, size))
        pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
        images[place] = pixels.reshape(size, size, 3).permute(2, 0, 1).float() / 255
    return images
