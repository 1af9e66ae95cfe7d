"""What an upload passes through on its way: projection, noise, quantizer, packed bytes.

A filter scales information down, which protects only where precision is finite. A `Channel` makes
it finite, and is the same object for the edge, the audit and the wire. Who receives needs its
quantizer alone, and never the key of its noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prifu_plugin.arguments import number, whole_number
from prifu_plugin.errors import ConfigError, OrderError
from prifu_plugin.keyed import check_key, keyed_gaussian
from prifu_plugin.projection import Projection as Projection


class Channel(nn.Module):
    """A sequence of steps an upload passes: what arrives is what `forward` returns.

    Args:
        steps: any of `Projection`, `Noise`, `Quantizer`, in order; a quantizer comes last.

    Example:
        >>> z = torch.randn(100, 8)
        >>> channel = Channel(Quantizer(4).fit(z))
        >>> wire = channel.encode(z[:1])
        >>> len(wire), torch.equal(channel.decode(wire, (1, 8)), channel(z[:1]))
        (4, True)
    """

    def __init__(self, *steps: Projection | Noise | Quantizer) -> None:
        super().__init__()
        odd = [step for step in steps if not isinstance(step, Projection | Noise | Quantizer)]
        if odd:
            raise ConfigError(
                f"{type(odd[0]).__name__} is no step of a Channel: pass Projection, Noise and "
                "Quantizer, one after the other."
            )
        if any(isinstance(step, Quantizer) for step in steps[:-1]):
            raise ConfigError("A quantizer makes the bytes: it must be the last step of a Channel.")
        self.steps = nn.ModuleList(steps)

    def forward(self, z: Tensor) -> Tensor:
        """Return what arrives, (N, ...)."""
        for step in self.steps:
            z = step(z)
        return z

    def encode(self, z: Tensor) -> bytes:
        """Return the bytes on the wire for a batch of uploads.

        Raises:
            ConfigError: if an upload is not finite, as fp32 too.
            OrderError: if the channel is in train mode and draws noise, which the key would not
                decide then.
        """
        if self.training and any(isinstance(step, Noise) for step in self.steps):
            raise OrderError(
                "The channel is in train mode, where its noise is drawn without the key: call its "
                "eval() before anything is sent."
            )
        return self._wire(z)

    def _wire(self, z: Tensor) -> bytes:
        _check_sendable(z)
        for step in self.steps:
            if isinstance(step, Quantizer):
                return step.pack(step.levels(z))
            z = step(z)
        _check_sendable(z)
        return z.detach().float().cpu().contiguous().numpy().tobytes()

    def decode(self, wire: bytes, shape: Sequence[int]) -> Tensor:
        """Return what arrives from the bytes.

        Args:
            wire: from `encode`.
            shape: of the batch as it arrives, (N, ...).

        Returns:
            fp32, whatever the dtype of what was sent.

        Raises:
            ConfigError: if the bytes are not of that shape, or are none.
        """
        _check_received(wire, shape)
        last = self.steps[-1] if len(self.steps) else None
        if isinstance(last, Quantizer):
            return last.values(last.unpack(wire, shape))
        if len(wire) != 4 * math.prod(shape):
            raise ConfigError(f"{len(wire)} bytes are not fp32 of shape {tuple(shape)}.")
        if not wire:
            return torch.zeros(tuple(shape))
        return torch.frombuffer(bytearray(wire), dtype=torch.float32).reshape(tuple(shape)).clone()

    def bytes_per_sample(self, z: Tensor) -> int:
        """Return the bytes on the wire for one sample of a batch."""
        return len(self._wire(z[:1]))


def _check_sendable(z: Any) -> None:
    if not isinstance(z, Tensor):
        raise ConfigError(f"The upload is a {type(z).__name__}: pass one tensor, (N, ...).")
    if not torch.isfinite(z.detach().float()).all():
        raise ConfigError(
            "An upload is NaN or infinite as fp32: nothing is sent. Look at its input."
        )


def _check_received(wire: Any, shape: Any) -> None:
    if not isinstance(wire, bytes | bytearray | memoryview):
        raise ConfigError(f"What arrived is a {type(wire).__name__}: pass the bytes of encode.")
    listed = isinstance(shape, tuple | list)
    if not listed or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ConfigError(f"shape={shape!r}: pass that of the batch, whole numbers (N, ...).")


class Quantizer(nn.Module):
    """A uniform quantizer of 1 to 8 bits with one scale for the whole tensor.

    One scale, not one a channel: a channel that a filter made small falls below the step and is
    gone. The gradient passes straight through within the range.

    Args:
        bits: 1 to 8.

    Example:
        >>> q = Quantizer(2).fit(torch.tensor([[-1.0, 2.0]]))
        >>> q(torch.tensor([[-1.0, 0.1, 5.0]])).tolist()
        [[-1.0, 0.0, 2.0]]
    """

    low: Tensor
    high: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = whole_number("bits", bits)
        if self.bits > 8:
            raise ConfigError(f"bits={bits}: a quantizer has at most 8. Pass bits= 1 to 8.")
        self.register_buffer("low", torch.tensor(float("nan")))
        self.register_buffer("high", torch.tensor(float("nan")))

    def fit(self, z: Tensor) -> Quantizer:
        """Set the range to that of training uploads; never fit on what is audited."""
        if not isinstance(z, Tensor) or not torch.isfinite(z).all() or z.numel() == 0:
            raise ConfigError(
                "The uploads to fit a quantizer on are empty, not finite or no tensor: pass what "
                "the edge returns for training images."
            )
        low, high = z.detach().float().min(), z.detach().float().max()
        if not torch.isfinite(high - low):
            raise ConfigError(
                f"The uploads reach from {float(low):.1e} to {float(high):.1e}, which no fp32 step "
                "divides: let the edge scale them down."
            )
        with torch.inference_mode(False):  # it may be trained with later
            self.low = torch.tensor(float(low), device=z.device)
            self.high = torch.tensor(float(high), device=z.device)
        return self

    def forward(self, z: Tensor) -> Tensor:
        """Return the quantized values, shape and dtype of z; fp32 for whole numbers."""
        z = z if z.is_floating_point() else z.float()
        found = self.values(self.levels(z)).to(z.dtype)
        inside = torch.maximum(torch.minimum(z, self.high.to(z)), self.low.to(z))
        return found.detach() + (inside - inside.detach())

    def levels(self, z: Tensor) -> Tensor:
        """Return the number of each value's level, uint8, 0 to 2^bits - 1."""
        if not torch.compiler.is_compiling() and torch.isnan(self.low):
            raise ConfigError("The quantizer has no range: call fit on training uploads first.")
        step = self._step()
        place = (z.detach().float() - self.low) / torch.where(step > 0, step, torch.inf)
        return place.round().clamp(0, 2**self.bits - 1).to(torch.uint8)

    def values(self, levels: Tensor) -> Tensor:
        """Return the value of each level, fp32."""
        if not torch.compiler.is_compiling() and torch.isnan(self.low):
            raise ConfigError(
                "The quantizer has no range: load the state of the one that the sender has fitted."
            )
        return self.low + levels.float() * self._step()

    def pack(self, levels: Tensor) -> bytes:
        """Pack levels without a gap; the last byte is filled up with zeros."""
        flat = levels.detach().cpu().flatten()
        shifts = torch.arange(self.bits - 1, -1, -1, dtype=torch.uint8)
        bits = (flat[:, None] >> shifts) & 1
        bits = nn.functional.pad(bits.flatten(), (0, -flat.numel() * self.bits % 8)).reshape(-1, 8)
        weights = 2 ** torch.arange(7, -1, -1)
        return bytes((bits.long() * weights).sum(1).to(torch.uint8).numpy().tobytes())

    def unpack(self, wire: bytes, shape: Sequence[int]) -> Tensor:
        """Return the levels from the bytes, uint8 of a shape."""
        count = math.prod(shape)
        if len(wire) != -(-count * self.bits // 8):
            raise ConfigError(
                f"{len(wire)} bytes are not {count} values of {self.bits} bits: wrong shape?"
            )
        if not count:
            return torch.zeros(tuple(shape), dtype=torch.uint8, device=self.low.device)
        raw = torch.frombuffer(bytearray(wire), dtype=torch.uint8)
        shifts = torch.arange(7, -1, -1, dtype=torch.uint8)
        bits = ((raw[:, None] >> shifts) & 1).flatten()[: count * self.bits].reshape(-1, self.bits)
        weights = 2 ** torch.arange(self.bits - 1, -1, -1)
        levels: Tensor = (bits.long() * weights).sum(1).to(torch.uint8).reshape(tuple(shape))
        return levels.to(self.low.device)

    def _step(self) -> Tensor:
        step: Tensor = (self.high - self.low) / (2**self.bits - 1)
        return step

    def extra_repr(self) -> str:
        """Say bits and range."""
        return f"bits={self.bits}, low={float(self.low):.3g}, high={float(self.high):.3g}"


class Noise(nn.Module):
    """Gaussian noise of a fixed scale, drawn once for each upload.

    In eval mode the draw is a function of the upload, in coarse steps, and of a secret key: the
    same query returns the same answer, in another batch too, whose fp32 results differ in their
    last digits (half precision rounds by more, and some uploads are drawn anew). A query that
    differs a little is drawn anew, so that averaging over *varied* queries still helps an
    attacker; `prifu_plugin.audit` tries that. In training the draw is fresh.

    Args:
        scale: standard deviation, in units of z.
        key: the edge's secret, 16 to 64 random bytes (`secrets.token_bytes(32)`).

    Example:
        >>> noise = Noise(0.3, key=b"thirty-two secret random bytes..").eval()
        >>> z = torch.zeros(2, 4)
        >>> torch.equal(noise(z), noise(z))
        True
    """

    def __init__(self, scale: float, key: bytes) -> None:
        super().__init__()
        self.scale = number("scale", scale)
        if not self.scale >= 0 or not math.isfinite(self.scale):
            raise ConfigError(f"scale={scale} is not at least 0.")
        self.key = check_key(key)

    def forward(self, z: Tensor) -> Tensor:
        """Return z with noise, shape and dtype of z."""
        if self.training:
            return z + self.scale * torch.randn_like(z)
        return z + self.scale * keyed_gaussian(z, self.key, self.scale or math.inf)

    def extra_repr(self) -> str:
        """Say the scale, not the key."""
        return f"scale={self.scale}"


def image_bytes(images: Tensor) -> dict[str, float]:
    """Return what sending the images instead would cost, bytes a sample: PNG, JPEG, raw.

    Args:
        images: (N, 3, H, W) in [0, 1], or (N, 1, H, W) of grey ones.

    Raises:
        ConfigError: for other shapes.
        ImportError: if Pillow is missing.

    Example:
        >>> image_bytes(torch.zeros(2, 3, 8, 8))["raw"]
        192.0
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("PNG and JPEG need Pillow: pip install 'prifu_plugin[audit]'") from error
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ConfigError(f"images are {tuple(images.shape)}: pass (N, 3, H, W) or (N, 1, H, W).")
    import io

    def size(image: Tensor, **settings: Any) -> int:
        file = io.BytesIO()
        pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        grey = pixels.shape[2] == 1
        Image.fromarray(pixels.squeeze(2) if grey else pixels).save(file, **settings)
        return file.tell()

    return {
        "raw": float(images[0].numel()),
        "png": sum(size(i, format="PNG") for i in images) / len(images),
        "jpeg": sum(size(i, format="JPEG", quality=75) for i in images) / len(images),
    }
