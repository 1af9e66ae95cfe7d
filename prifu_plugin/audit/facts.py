"""What is uploaded, as facts: values, rank, bits, and bytes against those of the image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prifu_plugin.audit.data import uploads
from prifu_plugin.audit.result import UploadFacts
from prifu_plugin.channel import Channel, Quantizer, image_bytes
from prifu_plugin.cut import CutFilter
from prifu_plugin.device import device_of

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
        live = (live - live.mean(0))[:2000, :4096]
        values = torch.linalg.svdvals(live)
        strong = values[values > 1e-7 * values[0]]
        rank, condition = len(strong), float(strong[0] / strong[-1])
    sent = uploads(edge, images[:1], "one upload")
    return UploadFacts(
        tuple(z.shape[1:]),
        sent[0].numel() * 4
        if channel is None
        else channel.bytes_per_sample(sent.to(device_of(channel))),
        flat.shape[1],
        int((~varying).sum()),
        rank,
        condition,
        stochastic,
        _bits(edge, channel, sent[0], z[0]),
        sent[0].numel() * 4,
        image_bytes(images[:_IMAGES].float()) if _are_images(images) else {},
    )


def _bits(edge: nn.Module, channel: Channel | None, sent: Tensor, arrived: Tensor) -> float | None:
    """Return the smaller bound on what one upload can hold, None if there is none."""
    bounds = []
    cuts = [module for module in edge.modules() if isinstance(module, CutFilter)]
    if cuts and cuts[-1].noise > 0:
        channels = cuts[-1].bits()
        bounds.append(float(channels.sum()) * sent.numel() / len(channels))
    if channel is not None:
        bounds += [
            float(step.bits * arrived.numel())
            for step in channel.steps
            if isinstance(step, Quantizer)
        ]
    return min(bounds, default=None)


def _are_images(images: Tensor) -> bool:
    inside = images.ndim == 4 and images.shape[1] == 3 and images.is_floating_point()
    return inside and float(images.min()) >= 0 and float(images.max()) <= 1
