"""Gaussian noise that is a function of a sample and a secret: drawn once, however often asked."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from prifu_plugin.errors import ConfigError


def check_key(key: bytes) -> bytes:
    """Return a key, or raise ConfigError if it is not 16 to 64 bytes."""
    if not isinstance(key, bytes) or not 16 <= len(key) <= 64:
        raise ConfigError("key must be 16 to 64 random bytes: secrets.token_bytes(32).")
    return key


def keyed_gaussian(batch: Tensor, key: bytes) -> Tensor:
    """Return unit Gaussian noise for each sample of a batch, shape, device and dtype of it.

    Args:
        batch: (N, ...); every bit of a sample counts.
        key: 16 to 64 secret bytes.

    Example:
        >>> z = torch.zeros(2, 3)
        >>> noise = keyed_gaussian(z, b"sixteen bytes ..")
        >>> torch.equal(noise, keyed_gaussian(z, b"sixteen bytes .."))
        True
    """
    drawn = [_draw(sample, key) for sample in batch.detach().float().cpu()]
    return torch.stack(drawn).to(batch)


def _draw(sample: Tensor, key: bytes) -> Tensor:
    # Every bit counts: uploads that shared a draw would tell by it that they are alike.
    content = sample.contiguous().numpy().tobytes()
    seed = hashlib.blake2b(content, key=key, digest_size=64).digest()
    count = sample.numel() + sample.numel() % 2
    # An extendable hash, since a generator seeded with 32 bits can be tried out.
    stream = hashlib.shake_256(key + seed).digest(8 * count)
    words = torch.frombuffer(bytearray(stream), dtype=torch.int64)
    uniform = ((words >> 11).double() + 2.0**52 + 0.5) / 2.0**53
    first, second = uniform.chunk(2)
    radius = (-2 * first.log()).sqrt()
    pair = torch.cat([radius * (2 * math.pi * second).cos(), radius * (2 * math.pi * second).sin()])
    return pair[: sample.numel()].reshape(sample.shape).float()
