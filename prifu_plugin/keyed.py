"""Gaussian noise that is a function of a sample and a secret: drawn once, however often asked."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from prifu_plugin.errors import ConfigError


def check_key(key: bytes) -> bytes:
    """Return a key, or raise ConfigError if it is not 16 to 64 bytes."""
    if not isinstance(key, bytes) or not 16 <= len(key) <= 64:
        raise ConfigError("key must be 16 to 64 random bytes: secrets.token_bytes(32).")
    return key


def keyed_gaussian(batch: Tensor, key: bytes) -> Tensor:
    """Return unit Gaussian noise for each sample of a batch, shape, device and dtype of it.

    What counts of a sample is its values in steps of about 1/16 of their deviation: the same image
    in another batch differs in its last digits, and must not get another draw to average.

    Args:
        batch: (N, ...).
        key: 16 to 64 secret bytes.

    Example:
        >>> z = torch.zeros(2, 3)
        >>> noise = keyed_gaussian(z, b"sixteen bytes ..")
        >>> torch.equal(noise, keyed_gaussian(z, b"sixteen bytes .."))
        True
    """
    drawn = [_draw(sample, key) for sample in batch.detach().cpu()]
    return torch.stack(drawn).to(batch) if drawn else torch.zeros_like(batch)


class KeyedNoise(nn.Module):
    """Unit Gaussian noise for each upload: a function of it and the key, or anew without a key.

    Args:
        key: 16 to 64 secret bytes, or None. A pickle of the module holds it, a state dict does not.

    Example:
        >>> noise = KeyedNoise(b"sixteen bytes ..").eval()
        >>> z = torch.zeros(2, 3)
        >>> torch.equal(noise(z), noise(z))
        True
    """

    def __init__(self, key: bytes | None = None) -> None:
        super().__init__()
        self.key = key

    def forward(self, z: Tensor) -> Tensor:
        """Return noise, shape and dtype of z; in training it is drawn anew."""
        if self.training or self.key is None:
            return torch.randn_like(z)
        return keyed_gaussian(z, check_key(self.key))

    def extra_repr(self) -> str:
        """Say whether there is a key, not which."""
        return "no key" if self.key is None else "with a key"


def _draw(sample: Tensor, key: bytes) -> Tensor:
    seed = hashlib.blake2b(_content(sample), key=key, digest_size=64).digest()
    count = sample.numel() + sample.numel() % 2
    # An extendable hash, since a generator seeded with 32 bits can be tried out.
    stream = hashlib.shake_256(key + seed).digest(8 * count)
    words = torch.frombuffer(bytearray(stream), dtype=torch.int64)
    uniform = ((words >> 11).double() + 2.0**52 + 0.5) / 2.0**53
    first, second = uniform.chunk(2)
    radius = (-2 * first.log()).sqrt()
    pair = torch.cat([radius * (2 * math.pi * second).cos(), radius * (2 * math.pi * second).sin()])
    return pair[: sample.numel()].reshape(sample.shape).float()


def _content(sample: Tensor) -> bytes:
    """Return a sample in coarse steps: a power of two, which hardly depends on last digits."""
    exact = sample.double().flatten()
    deviation = float(exact.std(correction=0)) if exact.numel() else 0.0
    step = 2.0 ** (math.floor(math.log2(deviation)) - 4) if 0 < deviation < math.inf else 1.0
    places = (exact / step).round().nan_to_num().clamp(-(2**62), 2**62).long()
    return step.hex().encode() + places.numpy().tobytes()
