"""What an attacker gets: uploads as they arrive, means of queries, answers, rebuilt images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prifu_plugin.audit.data import AuditData, uploads
from prifu_plugin.audit.reconstruction import Reconstruction, reconstruct
from prifu_plugin.channel import Channel, Noise, Quantizer
from prifu_plugin.cut import CutFilter
from prifu_plugin.device import device_of, like_of
from prifu_plugin.errors import ConfigError, PrifuError, first_line
from prifu_plugin.graph.undisturbed import undisturbed
from prifu_plugin.keyed import KeyedNoise
from prifu_plugin.learned import check_logits, named


@dataclass(frozen=True)
class Sent:
    """What an attacker gets of the data.

    Attributes:
        parts: data for training, choosing and judging attackers.
        uploads: what arrives of each part, fp32 on the CPU.
        answers: the task's answers to each part.
        means: means of repeated queries of each part; None if there is nothing to average.
        stochastic: whether the very same images arrive otherwise the second time.
    """

    parts: tuple[AuditData, ...]
    uploads: tuple[Tensor, ...]
    answers: tuple[Tensor, ...]
    means: tuple[Tensor, ...] | None
    stochastic: bool


def send(
    edge: nn.Module,
    channel: Channel | None,
    cloud: nn.Module | None,
    parts: tuple[AuditData, ...],
    *,
    task: str,
    queries: int,
    name: str = "edge",
) -> Sent:
    """Upload the data.

    Args:
        edge: images -> uploads.
        channel: what uploads pass through.
        cloud: what arrives -> the task's logits; without one, answers are the true labels.
        parts: data for training, choosing and judging attackers.
        task: name of the label that the cloud answers.
        queries: how often an attacker may ask about an image.
        name: of the edge, for messages.
    """
    uploads = tuple(arrived(edge, channel, part.images, name) for part in parts)
    stochastic = is_stochastic(edge, channel, parts[-1].images[:8])
    hides = any(is_keyed(part) or is_coarse(part) for part in (edge, channel or nn.Identity()))
    pairs = zip(uploads, parts, strict=True)
    answers = tuple(answers_of(cloud, z, part.labels[task]) for z, part in pairs)
    means = None
    if queries > 1 and (stochastic or hides):
        amplitude = amplitude_for(edge, channel, parts[0].images)
        means = tuple(
            mean_of_queries(edge, channel, part.images, queries, amplitude) for part in parts
        )
    return Sent(parts, uploads, answers, means, stochastic)


def arrived(edge: nn.Module, channel: Channel | None, images: Tensor, what: str) -> Tensor:
    """Return what arrives of images behind edge and channel, fp32 on the CPU."""
    z = uploads(edge, images, f"uploads of {what}")
    if channel is None:
        return z
    with undisturbed(channel), torch.no_grad():
        passed: Tensor = _answer("channel", channel.eval(), z.to(device_of(channel)))
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


def is_coarse(module: nn.Module) -> bool:
    """Whether values are rounded, which the mean over varied queries undoes."""
    return any(isinstance(part, Quantizer) for part in module.modules())


def mean_of_queries(
    edge: nn.Module, channel: Channel | None, images: Tensor, queries: int, amplitude: float
) -> Tensor:
    """Ask again and again, each time a little differently.

    Noise drawn once is drawn anew, and a value is rounded up and down in proportion.
    """
    generator = torch.Generator().manual_seed(0)
    total = arrived(edge, channel, images, "repeated queries")
    for _ in range(queries - 1):
        varied = _varied(images, amplitude, generator)
        total = total + arrived(edge, channel, varied, "repeated queries")
    return total / queries


AMPLITUDES = (1e-3, 4e-3, 1.6e-2, 6.4e-2)
"""Of variations of images, as shares of their range."""


def amplitude_for(edge: nn.Module, channel: Channel | None, images: Tensor) -> float:
    """Return the least variation of images that draws nearly all keyed noise anew.

    It is in units of the images, tried on the first of them.
    """
    low, high = float(images.amin()), float(images.amax())
    usual = images.is_floating_point() and low >= 0 and 0.5 < high <= 1
    unit, images = 1.0 if usual else high - low, images[:64]
    first = arrived(edge, channel, images, "a probe")
    changes = []
    for share in AMPLITUDES:
        varied = _varied(images, share * unit, torch.Generator().manual_seed(1))
        changes.append(float((arrived(edge, channel, varied, "a probe") - first).abs().mean()))
    enough = (
        a for a, change in zip(AMPLITUDES, changes, strict=True) if change > 0.9 * max(changes)
    )
    return unit * next(enough, AMPLITUDES[-1])


def _varied(images: Tensor, amplitude: float, generator: torch.Generator) -> Tensor:
    """Add noise to each value and to each image as a whole, which averages over values miss."""
    values = torch.randn(images.shape, generator=generator)
    whole = torch.randn(len(images), *[1] * (images.ndim - 1), generator=generator)
    change = amplitude * (values + whole)
    if images.is_floating_point():
        return images + change.to(images)
    varied = (images.cpu() + change).round()
    return varied.clamp(float(images.amin()), float(images.amax())).to(images)


def answers_of(cloud: nn.Module | None, z: Tensor, labels: Tensor) -> Tensor:
    """Return the task's answer for each upload; without a cloud, the true one, a higher floor."""
    if cloud is None:
        return labels
    like = like_of(cloud)
    with torch.no_grad():
        # Copies, since a cloud that begins in place would overwrite what is to be attacked.
        parts = (part.to(like.device, like.dtype, copy=True) for part in z.split(250))
        answers = [_answer("cloud", cloud, part) for part in parts]
    strange = next((a for a in answers if not isinstance(a, Tensor) or a.ndim > 2), None)
    if strange is not None:
        what = tuple(strange.shape) if isinstance(strange, Tensor) else type(strange).__name__
        raise ConfigError(
            f"The cloud returns {what}: let it return the task's logits, (N, classes), or one "
            "logit of two classes, (N, 1) or (N,)."
        )
    logits = torch.cat([answer.float().cpu() for answer in answers])
    if not torch.isfinite(logits).all():
        raise ConfigError(
            "The cloud returns NaN or infinite logits for uploads of this data: its answers mean "
            "nothing, and neither would a floor made of them."
        )
    check_logits(logits)
    return named(logits)


def _answer(what: str, module: nn.Module, z: Tensor) -> Any:
    try:
        return module(z)
    except PrifuError:
        raise
    except Exception as error:
        raise ConfigError(
            f"The {what} refuses uploads of shape {tuple(z.shape)} ({first_line(error)}). The "
            "cloud takes what arrives behind the channel: with a Projection in it, its server() "
            "stands for the first layer."
        ) from error


def rebuilt(
    edge: nn.Module,
    channel: Channel | None,
    sent: Sent,
    suite: str,
    seed: int,
    losses: Sequence[str],
) -> Reconstruction:
    """Attack with decoders and, but for the quick suite, by search."""
    like = like_of(edge)
    device, quick = like.device, suite == "quick"

    def upload(x: Tensor) -> Tensor:
        z: Tensor = edge(x.to(like)).float()
        arrived: Tensor = z if channel is None else channel(z.to(device_of(channel)))
        return arrived.float().cpu()

    with undisturbed(channel or nn.Identity()):
        if channel is not None:
            channel.eval()
        both = zip(sent.uploads, sent.parts, strict=True)
        pairs = [(z, part.images.float()) for z, part in both]
        return reconstruct(
            pairs[0],
            pairs[1],
            pairs[2],
            (sent.answers[0], sent.answers[2]),
            edge=None if quick else upload,
            seed=seed,
            steps=60 if quick else 250,
            losses=losses,
            repeated=sent.means if suite == "full" else None,
            device=device,
        )
