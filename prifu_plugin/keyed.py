"""Gaussian noise that is a function of a sample and a secret: drawn once, however often asked."""

from __future__ import annotations

import functools
import hashlib
import math

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from prifu_plugin.errors import ConfigError


def check_key(key: bytes) -> bytes:
    """Return a key, or raise ConfigError if it is not 16 to 64 bytes."""
    if not isinstance(key, bytes) or not 16 <= len(key) <= 64:
        raise ConfigError("key must be 16 to 64 random bytes: secrets.token_bytes(32).")
    return key


def keyed_gaussian(batch: Tensor, key: bytes, finest: float = math.inf) -> Tensor:
    """Return unit Gaussian noise for each sample of a batch, shape, device and dtype of it.

    What counts of a sample is 64 sums of all its values, with signs that the key decides, in coarse
    steps: the same image in another batch differs in its last digits, and must not get another draw
    to average. In fp32 hardly any does; in half precision, which rounds by more, some do.

    Args:
        batch: (N, ...).
        key: 16 to 64 secret bytes.
        finest: the deviation that the noise will have: uploads that differ by more are told apart,
            since two that share a draw show their difference.

    Example:
        >>> z = torch.zeros(2, 3)
        >>> noise = keyed_gaussian(z, b"sixteen bytes ..")
        >>> torch.equal(noise, keyed_gaussian(z, b"sixteen bytes .."))
        True
    """
    traced = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if traced or _is_exported() or get_proxy_mode() is not None:
        raise ConfigError(
            "Noise with a key is computed in Python, from each upload: a trace or an export would "
            "hold one fixed draw. Run this part in PyTorch, or export it without its key (key = "
            "None), with noise that is drawn anew."
        )
    if not batch.numel():
        return torch.zeros_like(batch)
    exact = batch.detach().cpu().double().flatten(1)
    # Few values have few sums that differ: the fewer there are, the finer each.
    share = min(_SUMS, 2 ** min(exact.shape[1] - 1, 6)) / _PARTS
    drawn = [
        _draw(_content(sums, min(norm * share, finest / 2)), exact.shape[1], key)
        for sums, norm in zip(_sums(exact, key), exact.norm(dim=1).tolist(), strict=True)
    ]
    return torch.stack(drawn).reshape(batch.shape).to(batch)


class KeyedNoise(nn.Module):
    """Unit Gaussian noise for each upload: a function of it and the key, or anew without a key.

    Args:
        key: 16 to 64 secret bytes, or None. A pickle of the module holds it, a state dict does not.
        finest: the deviation that the noise will have.

    Example:
        >>> noise = KeyedNoise(b"sixteen bytes ..").eval()
        >>> z = torch.zeros(2, 3)
        >>> torch.equal(noise(z), noise(z))
        True
    """

    def __init__(self, key: bytes | None = None, finest: float = math.inf) -> None:
        super().__init__()
        self.key = key
        self.finest = finest

    def forward(self, z: Tensor) -> Tensor:
        """Return noise, shape and dtype of z; in training it is drawn anew."""
        if self.training or self.key is None:
            return torch.randn_like(z)
        return keyed_gaussian(z, check_key(self.key), self.finest)

    def extra_repr(self) -> str:
        """Say whether there is a key, not which."""
        return "no key" if self.key is None else "with a key"


def _is_exported() -> bool:
    known = getattr(torch.compiler, "is_exporting", None)  # since torch 2.7
    return bool(known and known())


def _draw(content: bytes, size: int, key: bytes) -> Tensor:
    """Return Gaussian noise, (size,), fp32, that follows from a content and a key."""
    seed = hashlib.blake2b(content, key=key, digest_size=64).digest()
    count = size + size % 2
    # An extendable hash, since a generator seeded with 32 bits can be tried out.
    stream = hashlib.shake_256(key + seed).digest(8 * count)
    words = torch.frombuffer(bytearray(stream), dtype=torch.int64)
    uniform = ((words >> 11).double() + 2.0**52 + 0.5) / 2.0**53
    first, second = uniform.chunk(2)
    radius = (-2 * first.log()).sqrt()
    pair = torch.cat([radius * (2 * math.pi * second).cos(), radius * (2 * math.pi * second).sin()])
    return pair[:size].float()


def _content(sums: Tensor, width: float) -> bytes:
    """Return the sums of a sample, (64,), in steps of at most a width, a power of two."""
    step = 2.0 ** math.floor(math.log2(width)) if 0 < width < math.inf else 1.0
    steps = (sums / step).round().nan_to_num().clamp(-(2**62), 2**62).long()
    return step.hex().encode() + steps.numpy().tobytes()


_SUMS, _PARTS = 64, 512
"""A change by 1 / _PARTS of an upload carries about one of its sums over a border."""


def _sums(samples: Tensor, key: bytes) -> Tensor:
    """Return 64 sums of the values of each sample, (N, 64), each value with signs of its own.

    Few values of many differ between sparse uploads: all of the sums must see all of them.
    """
    total = torch.zeros(len(samples), _SUMS, dtype=torch.float64, device="cpu")
    for at, part in enumerate(samples.split(_CHUNK, 1)):
        total += part @ _signs(at, key)[: part.shape[1]].double()
    return total


_CHUNK = 4096


@functools.lru_cache(maxsize=64)
def _signs(at: int, key: bytes) -> Tensor:
    """Return -1 or 1 for each of _CHUNK values and each sum, (_CHUNK, 64), int8."""
    stream = hashlib.shake_256(b"signs %d " % at + key).digest(_CHUNK * _SUMS // 8)
    words = torch.frombuffer(bytearray(stream), dtype=torch.uint8)
    bits = (words[:, None] >> torch.arange(8, dtype=torch.uint8, device="cpu")) & 1
    return (2 * bits.reshape(_CHUNK, _SUMS).to(torch.int8) - 1).contiguous()
