"""audit: what does an upload still tell an attacker who knows everything but the input?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import prifu_plugin.audit.reconstruction as decoding
from prifu_plugin.audit.checks import check, check_images
from prifu_plugin.audit.data import AuditData, integers, split_off, uploads
from prifu_plugin.audit.inference import prepare
from prifu_plugin.audit.judge import Evidence, judge
from prifu_plugin.audit.result import AuditReport, UploadFacts
from prifu_plugin.audit.statistics import Interval, bootstrap
from prifu_plugin.channel import Channel, Noise
from prifu_plugin.errors import ConfigError
from prifu_plugin.graph.undisturbed import undisturbed

References = Mapping[str, nn.Module | AuditReport]


def audit(
    edge: nn.Module,
    train: AuditData,
    test: AuditData,
    *,
    task: str,
    attributes: Sequence[str],
    cloud: nn.Module | None = None,
    channel: Channel | None = None,
    references: References | None = None,
    suite: str = "standard",
    seeds: int = 2,
    queries: int = 16,
    reconstruct: bool | Sequence[str] = True,
    name: str = "edge",
    seed: int = 0,
) -> AuditReport:
    """Attack uploads with a suite, and report the strongest beside floors and ceilings.

    The attacker has the edge, its masks, codec and noise, and labelled training data, and trains
    on the defended uploads (Algorithm 1 of the paper). Every statement is empirical: a stronger
    attacker may read more.

    Args:
        edge: images -> uploads, in eval mode; from `prifu_plugin.split`.
        train: what attackers are trained and chosen on (a quarter is for choosing).
        test: what they are judged on; shares no image with train.
        task: name of the label the model serves.
        attributes: names of private labels.
        cloud: what arrives -> the task's logits: gives the utility and the task-only floor.
        channel: what uploads pass through.
        references: other edges to compare with, or what `audit` said of them on the same data:
            "plain" (the undefended model: leaks are measured against it) and "untrained". The
            images themselves are attacked too, unless one of the reports tells what came of it;
            any report on the same data may be given as "input" for that.
        suite: "standard" or "quick".
        seeds: of the attacks: the first chooses the strongest attacker, each of the others trains
            it anew, and their mean is reported.
        queries: how often an attacker may ask a noisy edge about the same image, to average the
            answers; 1 for an attacker who sees what one person uploads once.
        reconstruct: also reconstruct images, which must be in [0, 1]; True trains a decoder on each
            loss in `audit.reconstruction.LOSSES`, names choose among them.
        name: of what is audited, for the report.
        seed: of splits and bootstraps, and the first of the attacks.

    Returns:
        The report.

    Raises:
        ConfigError: for labels or images that do not fit.
        OrderError: if the edge is in train mode.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> x, s = torch.rand(600, 1, 8, 8, generator=g), torch.arange(600) % 2
        >>> x[s == 1] += 0.2
        >>> data = AuditData(x, {"task": (x.mean((1, 2, 3)) * 9).long() % 2, "bright": s})
        >>> parts = data.at(torch.arange(400)), data.at(torch.arange(400, 600))
        >>> found = audit(nn.Flatten().eval(), *parts, task="task", attributes=["bright"],
        ...               suite="quick", seeds=1, reconstruct=False)
        >>> found.attributes[0].accuracy.value > 0.95
        True
    """
    references = references or {}
    check(edge, train, test, task, list(attributes), {**references, "cloud": cloud})
    if seeds < 1 or queries < 1:
        raise ConfigError(f"seeds={seeds}, queries={queries}: an attack needs one at least.")
    losses = _losses(reconstruct, suite)
    if losses:
        check_images(train.images, test.images)
    train, test = integers(train), integers(test)
    fitting, choosing = split_off(train, 0.25, seed)
    parts = (fitting, choosing, test)
    sent = [_sent(edge, channel, part.images, name) for part in parts]
    stochastic = _is_stochastic(edge, channel, test.images[:8])
    noisy = channel is not None and any(isinstance(step, Noise) for step in channel.steps)
    answers = [_answers(cloud, z, part.labels[task]) for z, part in zip(sent, parts, strict=True)]
    prepared = {"sent": prepare(sent[0], sent[1], sent[2], suite, cloud)}
    if queries > 1 and (stochastic or noisy):
        means = [_mean_of_queries(edge, channel, part.images, queries) for part in parts]
        prepared["repeated"] = prepare(means[0], means[1], means[2], suite, cloud)
    reports = {k: v for k, v in references.items() if isinstance(v, AuditReport)}
    for label, other in references.items():
        if isinstance(other, nn.Module):
            zs = [_sent(other, None, part.images, label) for part in parts]
            prepared[f"reference {label}"] = prepare(zs[0], zs[1], zs[2], suite)
    if not any("input" in row.ceilings for r in reports.values() for row in r.attributes):
        images = [part.images.float() for part in parts]
        prepared["reference input"] = prepare(images[0], images[1], images[2], suite)
    bar = tqdm(attributes, desc=f"attacking {name}", leave=False, disable=None)
    evidence = Evidence(parts, answers, prepared, reports, task, seeds, seed)
    rows = [judge(label, evidence) for label in bar]
    return AuditReport(
        name,
        task,
        _utility(answers[2], test.labels[task], cloud, seed),
        tuple(rows),
        _facts(sent[0], _wire(edge, channel, test.images[:1]), stochastic),
        _reconstruction(edge, channel, sent, parts, answers, suite, seed, losses)
        if losses
        else None,
        (len(fitting), len(choosing), len(test)),
        {**_settings(suite, seeds, seed, references), "queries": queries},
        _not_tested(losses, suite, queries),
    )


def _sent(edge: nn.Module, channel: Channel | None, images: Tensor, what: str) -> Tensor:
    z = uploads(edge, images, f"uploads of {what}")
    if channel is None:
        return z
    with undisturbed(channel), torch.no_grad():
        arrived: Tensor = channel.eval()(z).detach().float()
    return arrived


def _is_stochastic(edge: nn.Module, channel: Channel | None, images: Tensor) -> bool:
    first, second = (_sent(edge, channel, images, "a probe") for _ in range(2))
    return not torch.equal(first, second)


def _mean_of_queries(
    edge: nn.Module, channel: Channel | None, images: Tensor, queries: int
) -> Tensor:
    """Ask again and again, each time a little differently: noise drawn once is drawn anew."""
    generator = torch.Generator().manual_seed(0)
    total = _sent(edge, channel, images, "repeated queries")
    for _ in range(queries - 1):
        varied = images + 1e-3 * torch.randn(images.shape, generator=generator)
        total = total + _sent(edge, channel, varied, "repeated queries")
    return total / queries


def _answers(cloud: nn.Module | None, z: Tensor, labels: Tensor) -> Tensor:
    """Return the task's answer for each upload; without a cloud, the true one, a higher floor."""
    if cloud is None:
        return labels
    device = next((p.device for p in cloud.parameters()), torch.device("cpu"))
    with torch.no_grad():
        # Copies, since a cloud that begins in place would overwrite what is to be attacked.
        logits = torch.cat([cloud(part.clone().to(device)).cpu() for part in z.split(250)])
    return (
        logits.argmax(1)
        if logits.ndim > 1 and logits.shape[1] > 1
        else (logits > 0).long().flatten()
    )


def _utility(
    answers: Tensor, labels: Tensor, cloud: nn.Module | None, seed: int
) -> Interval | None:
    if cloud is None:
        return None
    right = (answers == labels).double()
    return bootstrap(lambda index: float(right[index].mean()), len(right), seed)


def _wire(edge: nn.Module, channel: Channel | None, image: Tensor) -> int:
    """Return the bytes on the wire for one image."""
    z = uploads(edge, image, "one upload")
    return z[0].numel() * 4 if channel is None else channel.bytes_per_sample(z)


def _facts(z: Tensor, wire: int, stochastic: bool) -> UploadFacts:
    flat = z.flatten(1).double()
    varying = flat.amax(0) > flat.amin(0)
    live = flat[:, varying]
    rank, condition = 0, float("nan")
    if live.shape[1]:
        live = (live - live.mean(0))[:2000, :4096]
        values = torch.linalg.svdvals(live)
        strong = values[values > 1e-7 * values[0]]
        rank, condition = len(strong), float(strong[0] / strong[-1])
    return UploadFacts(
        tuple(z.shape[1:]), wire, flat.shape[1], int((~varying).sum()), rank, condition, stochastic
    )


def _reconstruction(
    edge: nn.Module,
    channel: Channel | None,
    sent: list[Tensor],
    parts: tuple[AuditData, ...],
    answers: list[Tensor],
    suite: str,
    seed: int,
    losses: Sequence[str],
) -> decoding.Reconstruction:
    images = parts[0].images
    device = next((p.device for p in edge.parameters()), torch.device("cpu"))
    quick = suite == "quick"
    searched = channel is None and not quick
    return decoding.reconstruct(
        (sent[0], images.float()),
        (sent[2], parts[2].images.float()),
        (answers[0], answers[2]),
        edge=(lambda x: edge(x.to(device)).cpu()) if searched else None,
        seed=seed,
        steps=60 if quick else 250,
        losses=losses,
    )


def _losses(reconstruct: bool | Sequence[str], suite: str) -> Sequence[str]:
    if isinstance(reconstruct, bool):
        every = ("squared error",) if suite == "quick" else tuple(decoding.LOSSES)
        return every if reconstruct else ()
    unknown = set(reconstruct) - set(decoding.LOSSES)
    if unknown:
        raise ConfigError(
            f"reconstruct={unknown.pop()!r}: choose among {', '.join(decoding.LOSSES)}, or True."
        )
    return reconstruct


def _settings(suite: str, seeds: int, seed: int, references: References) -> dict[str, Any]:
    return {
        "suite": suite,
        "attack seeds": seeds,
        "seed": seed,
        "references": sorted(references),
        "torch": torch.__version__,
    }


def _not_tested(losses: Sequence[str], suite: str, queries: int) -> tuple[str, ...]:
    found = ["generative priors (GAN, diffusion)", "membership of the training set", "timing"]
    if queries == 1:
        found.append("averages over repeated queries of the same image")
    if not losses:
        found.append("reconstruction")
    if suite == "quick":
        found.append("the standard suite: this was a quick look")
    return tuple(found)
