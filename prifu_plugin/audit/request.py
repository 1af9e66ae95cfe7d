"""What an audit was asked for, checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import nn

from prifu_plugin.arguments import strings, whole_number
from prifu_plugin.audit.checks import check, check_images, check_packages
from prifu_plugin.audit.data import AuditData, fingerprint, integers
from prifu_plugin.audit.result import AuditReport
from prifu_plugin.audit.similarity import LOSSES
from prifu_plugin.channel import Channel
from prifu_plugin.errors import ConfigError

References = Mapping[str, nn.Module | AuditReport]


@dataclass(frozen=True, kw_only=True)
class Request:
    """Arguments of `audit` that fit each other.

    Attributes:
        edge: images -> uploads.
        cloud: what arrives -> logits of the task; None if it is not to be judged.
        channel: what uploads pass through.
        train: what attackers are trained and chosen on, with labels in integers.
        test: what they are judged on.
        task: name of the label the model serves.
        attributes: names of private labels, each once.
        references: other edges to compare with, and earlier reports on the same data.
        suite: of attackers.
        seeds: how many of the attacks.
        queries: how often an edge is asked about the same image.
        losses: of the decoders, empty where nothing is reconstructed.
        name: of what is audited.
        seed: of splits and bootstraps, and the first of the attacks.
        data: digest of train and test.
    """

    edge: nn.Module
    cloud: nn.Module | None
    channel: Channel | None
    train: AuditData
    test: AuditData
    task: str
    attributes: tuple[str, ...]
    references: References
    suite: str
    seeds: int
    queries: int
    losses: Sequence[str]
    name: str
    seed: int
    data: str

    @property
    def labels(self) -> list[str]:
        """Names of the labels that are needed."""
        return [self.task, *self.attributes]

    @property
    def reports(self) -> dict[str, AuditReport]:
        """Earlier audits on the same data, by what they are."""
        return {k: v for k, v in self.references.items() if isinstance(v, AuditReport)}

    def settings(self) -> dict[str, Any]:
        """Return what the report says of how it was made."""
        names = ("prifu_plugin", "torch", "scikit-learn", "torchmetrics")
        steps = () if self.channel is None else self.channel.steps
        return {
            "suite": self.suite,
            "attack seeds": self.seeds,
            "seed": self.seed,
            "references": sorted(self.references),
            "channel": "none" if self.channel is None else ", ".join(map(repr, steps)),
            **{name: _version(name) for name in names},
            "queries": self.queries,
            "data": self.data,
        }


def requested(
    *,
    edge: nn.Module,
    train: AuditData,
    test: AuditData,
    task: str,
    attributes: Sequence[str],
    cloud: nn.Module | None,
    channel: Channel | None,
    references: References | None,
    suite: str,
    seeds: int,
    queries: int,
    reconstruct: bool | Sequence[str],
    name: str,
    seed: int,
) -> Request:
    """Check the arguments of `audit`, which says what they are.

    Raises:
        ConfigError: for labels, images or reports that do not fit.
        OrderError: if a module is in train mode.
        ImportError: if a package of the suite is missing.
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
    return Request(
        edge=edge,
        cloud=cloud,
        channel=channel,
        train=train,
        test=test,
        task=task,
        attributes=attributes,
        references=references,
        suite=suite,
        seeds=seeds,
        queries=queries,
        losses=losses,
        name=name,
        seed=seed,
        data=data,
    )


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


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
