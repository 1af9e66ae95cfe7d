"""Gaussian noise that is a function of a sample and a secret: drawn once, however often asked."""

from __future__ import annotations

import functools
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


def keyed_gaussian(batch: Tensor, key: bytes, finest: float = math.inf) -> Tensor:
    """Return unit Gaussian noise for each sample of a batch, shape, device and dtype of it.

    What counts of a sample is 64 sums of its values in coarse steps: the same image in another
    batch differs in its last digits, and must not get another draw to average. In fp32 one in
    thousands does; in half precision, one in four.

    Args:
        batch: (N, ...).
        key: 16 to 64 secret bytes.
        finest: uploads that differ by more, as a value of few among many constants may, are told
            apart: the deviation of the noise, so that two that share a draw show no more.

    Example:
        >>> z = torch.zeros(2, 3)
        >>> noise = keyed_gaussian(z, b"sixteen bytes ..")
        >>> torch.equal(noise, keyed_gaussian(z, b"sixteen bytes .."))
        True
    """
    drawn = [_draw(sample, key, finest) for sample in batch.detach().cpu()]
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


def _draw(sample: Tensor, key: bytes, finest: float) -> Tensor:
    if not sample.numel():
        return torch.zeros(sample.shape)
    seed = hashlib.blake2b(_content(sample, key, finest), key=key, digest_size=64).digest()
    count = sample.numel() + sample.numel() % 2
    # An extendable hash, since a generator seeded with 32 bits can be tried out.
    stream = hashlib.shake_256(key + seed).digest(8 * count)
    words = torch.frombuffer(bytearray(stream), dtype=torch.int64)
    uniform = ((words >> 11).double() + 2.0**52 + 0.5) / 2.0**53
    first, second = uniform.chunk(2)
    radius = (-2 * first.log()).sqrt()
    pair = torch.cat([radius * (2 * math.pi * second).cos(), radius * (2 * math.pi * second).sin()])
    return pair[: sample.numel()].reshape(sample.shape).float()


def _content(sample: Tensor, key: bytes, finest: float) -> bytes:
    """Return a sample in coarse steps: of sums of its values, which hardly depend on last digits.

    Each value is in one of the sums, with a sign of its own that the key decides. Rounding that
    would carry some of many values over a border is a small part of a sum's step.
    """
    exact = sample.double().flatten()
    sums = torch.zeros(_SUMS, dtype=torch.float64)
    place = torch.arange(exact.numel()) % _SUMS
    sums.index_add_(0, place, exact * _signs(exact.numel(), key))
    count = min(_SUMS, max(exact.numel(), 1))
    usual = float(exact.norm()) / math.sqrt(count)
    # The fewer sums there are, the finer each: what carries one of them over a border is alike.
    width = min(usual * count / _PARTS, finest / 2)
    step = 2.0 ** math.floor(math.log2(width)) if 0 < width < math.inf else 1.0
    steps = (sums / step).round().nan_to_num().clamp(-(2**62), 2**62).long()
    return step.hex().encode() + steps.numpy().tobytes()


_SUMS = 64
"""By how many numbers an upload is known."""
_PARTS = 512
"""A share of 1 / _PARTS that changes carries one sum over a border: uploads 1 % apart get other
noise in 98 of 100 cases, those that fp32 has rounded otherwise in 1 of 10,000."""


@functools.lru_cache(maxsize=8)
def _signs(count: int, key: bytes) -> Tensor:
    """Return -1 or 1 for each value of a sample, (count,), fp64."""
    stream = hashlib.shake_256(b"signs" + key).digest(-(-count // 8))
    words = torch.frombuffer(bytearray(stream or b"\0"), dtype=torch.uint8)
    bits = (words[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return 2.0 * bits.flatten()[:count].double() - 1.0
