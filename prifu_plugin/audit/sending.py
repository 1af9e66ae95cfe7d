"""What an attacker gets: uploads as they arrive, means of queries, answers, rebuilt images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import prifu_plugin.audit.reconstruction as decoding
from prifu_plugin.audit.data import AuditData, uploads
from prifu_plugin.channel import Channel, Noise
from prifu_plugin.cut import CutFilter
from prifu_plugin.device import device_of
from prifu_plugin.graph.undisturbed import undisturbed
from prifu_plugin.keyed import KeyedNoise


def arrived(edge: nn.Module, channel: Channel | None, images: Tensor, what: str) -> Tensor:
    """Return what arrives of images behind edge and channel, fp32 on the CPU."""
    z = uploads(edge, images, f"uploads of {what}")
    if channel is None:
        return z
    with undisturbed(channel), torch.no_grad():
        passed: Tensor = channel.eval()(z.to(device_of(channel)))
    return passed.detach().float().cpu()


def is_stochastic(edge: nn.Module, channel: Channel | None, images: Tensor) -> bool:
    """Whether the very same images arrive otherwise the second time."""
    first, second = (arrived(edge, channel, images, "a probe") for _ in range(2))
    return not torch.equal(first, second)


def is_keyed(module: nn.Module) -> bool:
    """Whether noise is drawn with a key, which the very same query does not show."""
    return any(
        isinstance(part, Noise | KeyedNoise)
        or (isinstance(part, CutFilter) and part.noise > 0 and part.key is not None)
        for part in module.modules()
    )


def mean_of_queries(
    edge: nn.Module, channel: Channel | None, images: Tensor, queries: int
) -> Tensor:
    """Ask again and again, each time a little differently: noise drawn once is drawn anew."""
    generator = torch.Generator().manual_seed(0)
    total = arrived(edge, channel, images, "repeated queries")
    for _ in range(queries - 1):
        varied = images
        if images.is_floating_point():
            noise = torch.randn(images.shape, generator=generator).to(images)
            varied = images + 1e-3 * noise
        total = total + arrived(edge, channel, varied, "repeated queries")
    return total / queries


def answers_of(cloud: nn.Module | None, z: Tensor, labels: Tensor) -> Tensor:
    """Return the task's answer for each upload; without a cloud, the true one, a higher floor."""
    if cloud is None:
        return labels
    device = device_of(cloud)
    with torch.no_grad():
        # Copies, since a cloud that begins in place would overwrite what is to be attacked.
        logits = torch.cat([cloud(part.clone().to(device)).cpu() for part in z.split(250)])
    return (
        logits.argmax(1)
        if logits.ndim > 1 and logits.shape[1] > 1
        else (logits > 0).long().flatten()
    )


def rebuilt(
    edge: nn.Module,
    channel: Channel | None,
    sent: list[Tensor],
    means: list[Tensor] | None,
    parts: tuple[AuditData, ...],
    answers: list[Tensor],
    suite: str,
    seed: int,
    losses: Sequence[str],
) -> decoding.Reconstruction:
    """Attack with decoders and, but for the quick suite, by search."""
    device = device_of(edge)
    quick = suite == "quick"

    def upload(x: Tensor) -> Tensor:
        z: Tensor = edge(x.to(device))
        arrived: Tensor = z if channel is None else channel(z.to(device_of(channel)))
        return arrived.cpu()

    with undisturbed(channel or nn.Identity()):
        if channel is not None:
            channel.eval()
        pairs = [(z, part.images.float()) for z, part in zip(sent, parts, strict=True)]
        return decoding.reconstruct(
            pairs[0],
            pairs[1],
            pairs[2],
            (answers[0], answers[2]),
            edge=None if quick else upload,
            seed=seed,
            steps=60 if quick else 250,
            losses=losses,
            repeated=means if suite == "full" else None,
            device=device,
        )
