"""An audit's result, as data: what JSON holds and every rendering shows."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from prifu_plugin.audit.reconstruction import Reconstruction
from prifu_plugin.audit.similarity import Similarity
from prifu_plugin.audit.statistics import Interval
from prifu_plugin.formats import FORMAT, read_format, reading


@dataclass(frozen=True, kw_only=True)
class AttributeResult:
    """What an attacker reads of one private attribute.

    Attributes:
        name: of the attribute.
        classes: how many there are.
        accuracy: of the strongest attacker, mean over attack seeds, with its interval.
        seeds: accuracy of the winner with each attack seed; the first chose it.
        balanced: balanced accuracy of the first seed.
        auc: of the first seed, with its interval.
        task_auc: of the task's own answer, what an AUC must exceed.
        gain: accuracy minus that of the better floor, image by image, with its interval.
        bits: learned of the attribute, first seed, by probabilities calibrated on validation data.
        majority: accuracy of the most frequent class, a floor.
        task_only: accuracy of the best guess from the task's own answer, a floor.
        ceilings: accuracy of the same suite on "plain", "untrained", "input" where given.
        leak: share of what the plain model gives away above the floor, with its interval; None if
            no plain model was given, it gives away nothing, or test items are too few to tell.
        leak_by_seed: the same share with each attack seed alone; empty where `leak` is None.
        winner: preparation and classifier of the strongest attacker.
        converged: whether its training had settled.
        half_data: its accuracy with half of the training data: far below accuracy means that more
            data would read more.
        permuted: accuracy of least squares trained on permuted labels, mean of ten: chance.
        once: accuracy of the strongest attack that sees one upload of each image.
        repeated: accuracy on the mean of repeated queries, None if neither edge nor channel draws
            noise or nobody asked twice; if it is the stronger attack by validation data, it is the
            one reported.
        marks: what makes this row no evidence, or limits it.
        tried: every attacker of the reported attack, by its score on validation data: the accuracy,
            or the AUC where one class is most of them. An attacker that is always right ends it.
        right: how often the attack is right, by test item, (N,); not written out.
        once_right: the same of the attack on one upload each; not written out.
        floor_right: whether the floor's guess is right, by test item, (N,); not written out.
    """

    name: str
    classes: int
    accuracy: Interval
    seeds: tuple[float, ...]
    balanced: float
    auc: Interval
    task_auc: float
    gain: Interval
    bits: float
    majority: float
    task_only: float
    ceilings: dict[str, float]
    leak: Interval | None
    winner: str
    converged: bool
    half_data: float
    permuted: float
    once: float
    repeated: float | None
    marks: tuple[str, ...]
    leak_by_seed: tuple[float, ...] = ()
    tried: dict[str, float] = field(default_factory=dict, compare=False)
    right: Tensor = field(default_factory=lambda: torch.empty(0), repr=False, compare=False)
    once_right: Tensor = field(default_factory=lambda: torch.empty(0), repr=False, compare=False)
    floor_right: Tensor = field(default_factory=lambda: torch.empty(0), repr=False, compare=False)

    @property
    def floor(self) -> float:
        """What is known without any upload but the task's answer."""
        return max(self.majority, self.task_only)

    @property
    def is_evidence(self) -> bool:
        """Whether a low accuracy here says anything."""
        return not self.marks


RANKED = 2000
"""Images whose uploads' rank is found."""


@dataclass(frozen=True, kw_only=True)
class UploadFacts:
    """What is uploaded.

    Attributes:
        shape: of one sample.
        bytes: on the wire, of one sample.
        values: how many numbers.
        constant: how many of them are the same for every image.
        rank: of the uploads of up to 2000 images and their first 4096 values that vary, relative to
            1e-7 of the largest direction; never more than the images less one.
        condition: largest over smallest of these directions; NaN if there are none.
        stochastic: whether the edge draws noise afresh for each query.
        bits: bound on what one upload holds: of the noise of a filter on the upload (Gaussian
            inputs), of the noise of a channel (values that vary as those of training), or of a
            quantizer, the least; None if nothing bounds it but fp32.
        bytes_as_float: of one sample in fp32.
        bytes_as_image: of the input instead, "raw", "png" and "jpeg"; empty if it is no image.
    """

    shape: tuple[int, ...]
    bytes: int
    values: int
    constant: int
    rank: int
    condition: float
    stochastic: bool
    bits: float | None = None
    bytes_as_float: int = 0
    bytes_as_image: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """The result of `prifu_plugin.audit`.

    Attributes:
        name: of what was audited.
        task: name of the task.
        utility: the task's accuracy by the cloud on what arrives, None if no cloud was given.
        attributes: by private attribute.
        upload: what is uploaded.
        reconstruction: None if it was not run.
        sizes: images for training, validation and test of the attacks.
        settings: suite, seeds, versions.
        not_tested: attacks that were not run, and why.
    """

    name: str
    task: str
    utility: Interval | None
    attributes: tuple[AttributeResult, ...]
    upload: UploadFacts
    reconstruction: Reconstruction | None
    sizes: tuple[int, int, int]
    settings: dict[str, Any]
    not_tested: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; reconstructed images are left out."""
        data = {"format": FORMAT, **asdict(self)}
        if self.reconstruction is not None:
            data["reconstruction"]["images"] = None
        for row in data["attributes"]:
            del row["right"], row["once_right"], row["floor_right"]
        plain: dict[str, Any] = _without_nan(data)
        return plain

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> AuditReport:
        """Read what `to_json` wrote; raises ConfigError for anything else."""
        data = read_format(text, "audit", ("name", "task", "attributes"))
        with reading("audit"):
            return cls(
                name=data["name"],
                task=data["task"],
                utility=_interval(data["utility"]),
                attributes=tuple(_attribute(item) for item in data["attributes"]),
                upload=_upload(data["upload"]),
                reconstruction=_reconstruction(data["reconstruction"]),
                sizes=tuple(data["sizes"]),
                settings=data["settings"],
                not_tested=tuple(data["not_tested"]),
            )

    def to_markdown(self) -> str:
        """Return the report as Markdown tables."""
        from prifu_plugin.audit.markdown import markdown

        return markdown([self])

    def to_html(self) -> str:
        """Return the report as one self-contained page."""
        from prifu_plugin.audit.page import html

        return html([self])

    def __rich__(self) -> Any:
        """Return what `rich.print` draws."""
        from rich.markdown import Markdown

        return Markdown(self.to_markdown())

    def __str__(self) -> str:
        return self.to_markdown()


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_without_nan(item) for item in value]
    return value


def _interval(data: dict[str, Any] | None) -> Interval | None:
    if data is None:
        return None
    return Interval(**{key: float("nan") if v is None else v for key, v in data.items()})


def _upload(data: dict[str, Any]) -> UploadFacts:
    condition = float("nan") if data["condition"] is None else data["condition"]
    return UploadFacts(**{**data, "shape": tuple(data["shape"]), "condition": condition})


def _attribute(data: dict[str, Any]) -> AttributeResult:
    fields = dict(data)
    for name in ("accuracy", "leak", "auc", "gain"):
        fields[name] = _interval(data[name])
    for name in ("task_auc", "bits", "balanced", "half_data", "permuted"):
        fields[name] = float("nan") if fields[name] is None else fields[name]
    for name in ("seeds", "marks", "leak_by_seed"):
        fields[name] = tuple(data.get(name, ()))
    return AttributeResult(**fields)


def _reconstruction(data: dict[str, Any] | None) -> Reconstruction | None:
    if data is None:
        return None
    decoders = {name: Similarity(**item) for name, item in data["decoders"].items()}
    return Reconstruction(
        decoders,
        _similarity(data["search"]),
        Similarity(**data["mean_image"]),
        Similarity(**data["task_mean"]),
        data["linkage"],
        data["chance"],
        torch.empty(2, 0),
        {int(k): v for k, v in data.get("retrieval", {}).items()},
        _similarity(data.get("search_floor")),
    )


def _similarity(data: dict[str, Any] | None) -> Similarity | None:
    return None if data is None else Similarity(**data)
