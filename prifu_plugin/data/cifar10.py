"""CIFAR-10 as living and not living: the task is a superset of the private class.

Reads the official binary version (cifar-10-batches-bin), which needs no pickle.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from prifu_plugin.audit.data import AuditData
from prifu_plugin.errors import ConfigError

LIVING = (2, 3, 4, 5, 6, 7)
"""Bird, cat, deer, dog, frog, horse; not living are airplane, automobile, ship, truck."""
_RECORD = 1 + 3 * 32 * 32


def load_cifar10(folder: str | Path, *, train: bool) -> AuditData:
    """Read a part of CIFAR-10.

    Args:
        folder: with data_batch_1.bin to data_batch_5.bin and test_batch.bin.
        train: the 50,000 images for training, or the 10,000 for testing.

    Returns:
        Images (N, 3, 32, 32) in [0, 1], labels "living" (the task) and "class" (private).

    Raises:
        ConfigError: if a file is missing or cut off.
    """
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if train else ["test_batch.bin"]
    records = torch.cat([_records(Path(folder) / name) for name in names])
    label = records[:, 0].long()
    living = torch.isin(label, torch.tensor(LIVING)).long()
    images = records[:, 1:].reshape(-1, 3, 32, 32).float() / 255
    return AuditData(images, {"living": living, "class": label})


def _records(file: Path) -> Tensor:
    if not file.exists():
        raise ConfigError(
            f"{file} is missing: unpack cifar-10-binary.tar.gz from "
            "https://www.cs.toronto.edu/~kriz/cifar.html and pass the folder cifar-10-batches-bin."
        )
    raw = bytearray(file.read_bytes())
    if not raw or len(raw) % _RECORD:
        raise ConfigError(f"{file} has {len(raw)} bytes, no multiple of {_RECORD}: it is cut off.")
    records = torch.frombuffer(raw, dtype=torch.uint8).reshape(-1, _RECORD)
    if int(records[:, 0].max()) > 9:
        raise ConfigError(f"{file} has classes above 9: it is not CIFAR-10.")
    return records
