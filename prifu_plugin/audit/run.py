"""audit: what does an upload still tell an attacker who knows everything but the input?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prifu_plugin.arguments import strings, whole_number
from prifu_plugin.audit.checks import check, check_images, check_packages
from prifu_plugin.audit.data import AuditData, fingerprint, integers
from prifu_plugin.audit.disjoint import split_off
from prifu_plugin.audit.facts import facts_of
from prifu_plugin.audit.inference import MANY, Prepared, prepare
from prifu_plugin.audit.judge import Evidence, judge
from prifu_plugin.audit.preparation import WIDE
from prifu_plugin.audit.reconstruction import Reconstruction
from prifu_plugin.audit.result import AuditReport
from prifu_plugin.audit.sending import Sent, arrived, rebuilt, send
from prifu_plugin.audit.similarity import LOSSES
from prifu_plugin.audit.statistics import Interval, mean_interval
from prifu_plugin.channel import Channel
from prifu_plugin.device import device_of, seeded
from prifu_plugin.errors import ConfigError

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

    Networks of the attacker train where the edge is, all else is computed on the CPU.
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
        suite: "standard"; "full" adds nearest neighbours and trees on every preparation, raw and
            ranked values of maps, and a decoder on the mean of repeated queries; "quick" is a look.
        seeds: of the attacks: the first chooses the strongest attacker, each of the others trains
            it anew, and their mean is reported.
        queries: how often an attacker may ask a noisy or rounding edge about the same image, a
            little varied, to average the answers; 1 for an attacker who sees what one person
            uploads once.
        reconstruct: also reconstruct images, which must be in [0, 1]; True trains a decoder on each
            loss, names choose among "squared error", "absolute error", "structure".
        name: of what is audited, for the report.
        seed: of splits and bootstraps, and the first of the attacks.

    Returns:
        The report.

    Raises:
        ConfigError: for labels or images that do not fit.
        OrderError: if the edge is in train mode.
        ImportError: if a package of the suite is missing; the message names it.

    Example:
        >>> import torch
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
    attributes = tuple(dict.fromkeys(strings("attributes", attributes) or ()))
    references = {} if references is None else references
    check(edge, train, test, task, attributes, references, cloud)
    check_packages(suite, reconstructs=bool(reconstruct))
    seeds, queries = whole_number("seeds", seeds), whole_number("queries", queries)
    seed = whole_number("seed", seed, least=0)
    if channel is not None and not isinstance(channel, Channel):
        raise ConfigError(
            f"channel is a {type(channel).__name__}: pass prifu_plugin.channel.Channel(step, ...), "
            "of Projection, Noise and Quantizer."
        )
    losses = _losses(reconstruct, suite)
    if losses:
        check_images(train.images, test.images)
    train, test = integers(train), integers(test)
    data = fingerprint(train, test)
    _check_comparable(references, data, suite)
    settings = {**_settings(suite, seeds, seed, references, channel), "queries": queries}
    parts = (*split_off(train, 0.25, seed, [task, *attributes]), test)
    device = device_of(edge)
    with torch.inference_mode(False):
        with seeded(seed, device):  # of noise that edges draw
            sent = send(edge, channel, cloud, parts, task=task, queries=queries, name=name)
            facts = facts_of(sent.uploads[0], edge, channel, test.images, sent.stochastic)
            read = _prepared(sent, references, attributes, suite, cloud, device)
        evidence = Evidence(
            parts=parts,
            answers=sent.answers,
            sent=read[0],
            repeated=read[1],
            others=read[2],
            reports={k: v for k, v in references.items() if isinstance(v, AuditReport)},
            task=task,
            constant=facts.constant == facts.values,
            seeds=seeds,
            seed=seed,
        )
        bar = tqdm(attributes, desc=f"attacking {name}", leave=False, disable=None)
        rows = tuple(judge(label, evidence) for label in bar)
        with seeded(seed, device):
            images = rebuilt(edge, channel, sent, suite, seed, losses) if losses else None
    return AuditReport(
        name=name,
        task=task,
        utility=_utility(sent.answers[2], test.labels[task], cloud, seed, test.groups),
        attributes=rows,
        upload=facts,
        reconstruction=images,
        sizes=(len(parts[0]), len(parts[1]), len(parts[2])),
        settings={**settings, "data": data, **_counted(parts)},
        not_tested=_not_tested(images, suite, queries, sent.uploads[0], test.groups),
    )


def _prepared(
    sent: Sent,
    references: References,
    attributes: Sequence[str],
    suite: str,
    cloud: nn.Module | None,
    device: torch.device,
) -> tuple[Prepared, Prepared | None, dict[str, Prepared]]:
    """Prepare all that is attacked: uploads, their means, those of other edges, and the images."""

    def ready(uploads: Iterable[Tensor], tail: nn.Module | None = None) -> Prepared:
        fitting, choosing, test = uploads
        return prepare(fitting, choosing, test, suite, tail, device)

    others = {}
    for label, other in references.items():
        if isinstance(other, nn.Module):
            there = (arrived(other, None, part.images, label) for part in sent.parts)
            others[label] = ready(there)
    told = (other for other in references.values() if isinstance(other, AuditReport))
    known = {row.name for report in told for row in report.attributes if "input" in row.ceilings}
    if not known.issuperset(attributes):
        images = (part.images.float() for part in sent.parts)
        others["input"] = ready(images)
    repeated = None if sent.means is None else ready(sent.means, cloud)
    return ready(sent.uploads, cloud), repeated, others


def _utility(
    answers: Tensor, labels: Tensor, cloud: nn.Module | None, seed: int, groups: Tensor | None
) -> Interval | None:
    if cloud is None:
        return None
    return mean_interval((answers == labels).double(), seed, groups=groups)


def _counted(parts: Sequence[AuditData]) -> dict[str, int]:
    """Say how many groups, which are persons mostly, test images are of."""
    groups = parts[-1].groups
    return {} if groups is None else {"test groups": len(groups.unique())}


def _losses(reconstruct: bool | Sequence[str], suite: str) -> Sequence[str]:
    if isinstance(reconstruct, bool):
        every = ("squared error",) if suite == "quick" else tuple(LOSSES)
        return every if reconstruct else ()
    named = strings("reconstruct", reconstruct) or ()
    unknown = set(named) - set(LOSSES)
    if unknown:
        raise ConfigError(
            f"reconstruct={unknown.pop()!r}: choose among {', '.join(LOSSES)}, or True."
        )
    return named


def _settings(
    suite: str, seeds: int, seed: int, references: References, channel: Channel | None
) -> dict[str, Any]:
    names = ("prifu_plugin", "torch", "scikit-learn", "torchmetrics")
    return {
        "suite": suite,
        "attack seeds": seeds,
        "seed": seed,
        "references": sorted(references),
        "channel": "none" if channel is None else ", ".join(map(repr, channel.steps)),
        **{name: _version(name) for name in names},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _check_comparable(references: References, data: str, suite: str) -> None:
    """Raise if a report is of other images, other labels, another order, or another suite."""
    for key, reference in references.items():
        known = reference.settings.get("data") if isinstance(reference, AuditReport) else None
        if known is not None and known != data:
            raise ConfigError(
                f"The report '{key}' was made of other data, or in another order: leaks compare "
                "image by image. Audit it with the same train and test, or pass the edge itself."
            )
        used = reference.settings.get("suite") if isinstance(reference, AuditReport) else suite
        if used != suite:
            raise ConfigError(
                f"The report '{key}' is of the {used} suite, and this audit asks for the {suite} "
                "one: a leak would be the difference of the attackers. Audit both with one suite, "
                "or pass the edge itself."
            )


def _not_tested(
    rebuilt: Reconstruction | None, suite: str, queries: int, z: Tensor, groups: Tensor | None
) -> tuple[str, ...]:
    found = ["generative priors (GAN, diffusion)", "membership of the training set", "timing"]
    found.append("codes in exact values (a zero that moves about, the parity of the last digit)")
    if groups is None:
        found.append("whether train and test show the same persons (no groups were given)")
    if queries == 1:
        found.append("averages over repeated queries of the same image")
    if rebuilt is None:
        found.append("reconstruction")
    else:
        best = max(one.psnr for one in rebuilt.decoders.values())
        if best < rebuilt.mean_image.psnr + 0.1:
            found.append("images from decoders (they ended at the floor: no evidence)")
    if rebuilt is not None and rebuilt.search is None:
        found.append("search for images against the edge")
    elif (
        rebuilt is not None
        and rebuilt.search is not None
        and rebuilt.search.psnr < rebuilt.floor_of_search.psnr + 0.1
    ):
        found.append("search for images against the edge (it ended at the floor: no evidence)")
    if rebuilt is not None and queries > 1 and suite != "full":
        found.append("reconstruction from repeated queries")
    if z[0].numel() > WIDE and z.ndim > 2:
        found.append(
            f"single values of such wide uploads ({z[0].numel()} numbers): vector attackers see "
            "their strongest components and their moments"
        )
    if z[0].numel() > MANY:
        left = "logistic regression" if suite == "full" else "trees and logistic regression"
        found.append(f"{left} on more than {MANY} values")
    if suite == "quick":
        found.append("the standard suite: this was a quick look")
    return tuple(found)
