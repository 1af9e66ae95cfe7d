"""What is uploaded, as facts: values, rank, bits, and bytes against those of the image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prifu_plugin.audit.data import uploads
from prifu_plugin.audit.result import RANKED, UploadFacts
from prifu_plugin.channel import Channel, Noise, Quantizer, image_bytes
from prifu_plugin.cut import CutFilter
from prifu_plugin.device import device_of
from prifu_plugin.graph.undisturbed import undisturbed

_IMAGES = 100
"""Images whose size as PNG and JPEG is averaged."""


def facts_of(
    z: Tensor, edge: nn.Module, channel: Channel | None, images: Tensor, stochastic: bool
) -> UploadFacts:
    """Describe uploads.

    Args:
        z: what arrives of many images, (N, ...).
        edge: what makes uploads.
        channel: what they pass through.
        images: inputs of the edge.
        stochastic: whether the edge draws noise afresh for each query.
    """
    flat = z.flatten(1).double()
    varying = flat.amax(0) > flat.amin(0)
    live = flat[:, varying]
    rank, condition = 0, float("nan")
    if live.shape[1]:
        live = (live - live.mean(0))[:RANKED, :4096]
        values = torch.linalg.svdvals(live)
        strong = values[values > 1e-7 * values[0]]
        rank, condition = len(strong), float(strong[0] / strong[-1])
    sent = uploads(edge, images[:1], "one upload")
    as_float = sent[0].numel() * 4
    wire = as_float
    if channel is not None:
        wire = channel.bytes_per_sample(sent.to(device_of(channel)))
    return UploadFacts(
        shape=tuple(z.shape[1:]),
        bytes=wire,
        values=flat.shape[1],
        constant=int((~varying).sum()),
        rank=rank,
        condition=condition,
        stochastic=stochastic,
        bits=_bits(edge, channel, images, z),
        bytes_as_float=as_float,
        bytes_as_image=image_bytes(images[:_IMAGES].float()) if _are_images(images) else {},
    )


def _bits(
    edge: nn.Module, channel: Channel | None, images: Tensor, arrived: Tensor
) -> float | None:
    """Return the least bound on what one upload can hold, None if there is none."""
    bounds = []
    noisy = _noisy_bits(edge, images[:1])
    if noisy is not None:
        bounds.append(noisy)
    if channel is not None:
        bounds += [
            float(step.bits * arrived[0].numel())
            for step in channel.steps
            if isinstance(step, Quantizer)
        ]
        bounds += _bits_of_noise(channel, edge, images)
    return min(bounds, default=None)


def _bits_of_noise(channel: Channel, edge: nn.Module, images: Tensor) -> list[float]:
    """Return for each noise of a channel the sum of log2(1 + variance / noise^2) / 2 over values.

    Values of that variance carry at most as much as Gaussian ones, and what follows adds nothing.
    """
    z = uploads(edge, images[:VARIED], "uploads").to(device_of(channel))
    bounds = []
    with undisturbed(channel), torch.no_grad():
        for step in channel.eval().steps:
            if isinstance(step, Noise) and step.scale > 0:
                variance = z.flatten(1).double().var(0)
                bounds.append(float(0.5 * (1 + variance / step.scale**2).log2().sum()))
            z = step(z)
    return bounds


VARIED = 500
"""Images by whose uploads it is measured how much a value varies."""


def _noisy_bits(edge: nn.Module, image: Tensor) -> float | None:
    """Return the bound of a filter with noise, if what it puts out is what is uploaded.

    Behind it others may follow, but then something else may go around it too.
    """
    made: list[tuple[CutFilter, Tensor]] = []
    cuts = [m for m in edge.modules() if isinstance(m, CutFilter) and m.noise > 0]
    hooks = [cut.register_forward_hook(lambda m, _, y: made.append((m, y.clone()))) for cut in cuts]
    try:
        sent = _uploaded(edge, image)
    finally:
        for hook in hooks:
            hook.remove()
    if not made or made[-1][1].shape != sent.shape or not torch.equal(made[-1][1], sent):
        return None
    channels = made[-1][0].bits()
    return float(channels.sum()) * sent[0].numel() / len(channels)


def _uploaded(edge: nn.Module, image: Tensor) -> Tensor:
    """Return the upload of one image as the edge makes it."""
    with torch.no_grad():
        upload: Tensor = edge(image.to(device_of(edge), copy=True))
    return upload


def _are_images(images: Tensor) -> bool:
    inside = images.ndim == 4 and images.shape[1] == 3 and images.is_floating_point()
    return inside and float(images.min()) >= 0 and float(images.max()) <= 1
