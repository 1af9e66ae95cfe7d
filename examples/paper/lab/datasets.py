"""Data sets split in three: what defenders train on, what attackers train on, what judges."""

import functools
from dataclasses import dataclass, replace

import torch

from lab.scale import Scale
from prifu_plugin import AuditData
from prifu_plugin.data import celeba, cifar10, lfw
from prifu_plugin.data.digits import load_digits
from prifu_plugin.data.faces import generate_faces

NAMED = {
    "digits": "colour",
    "faces": "glasses",
    "celeba": "Male",
    "lfw": "Youth",
    "cifar10": "class",
}
"""The label that methods which need one are told in training; the others stay unnamed."""


@dataclass(frozen=True, eq=False)
class Study:
    """One data set, split.

    Attributes:
        name: of the data set.
        task: name of the label that is served.
        private: names of the labels that attackers read.
        defence: what defenders train on.
        attack: what attackers train on.
        test: what all are judged on.
    """

    name: str
    task: str
    private: tuple[str, ...]
    defence: AuditData
    attack: AuditData
    test: AuditData

    @property
    def classes(self) -> int:
        """Number of the task's classes."""
        return int(self.defence.labels[self.task].max()) + 1

    @property
    def named(self) -> str:
        """The private label that is named in training."""
        return NAMED.get(self.name.split(":")[0], self.private[0])


@functools.lru_cache(maxsize=2)
def load(name: str, scale: Scale) -> Study:
    """Load a data set by name; "faces:cheekbones:0.8" are faces with an ordered correlation."""
    kind, *order = name.split(":")
    study = {
        "digits": _digits,
        "faces": _faces,
        "celeba": _celeba,
        "lfw": _lfw,
        "cifar10": _cifar10,
    }[kind](name, scale, *order)
    return replace(study, private=study.private[: scale.values.get("private")])


def _digits(name: str, scale: Scale) -> Study:
    defence, attack, test = scale["sizes"]["digits"]
    copies = scale["sizes"]["copies"]
    digits = load_digits(0, textured=True, copies=copies)
    labels = {
        "parity": digits.parity,
        "digit": digits.digit,
        "colour": digits.colour,
        "texture": digits.texture,
    }
    data = AuditData(digits.images, labels)
    painted = [torch.arange(defence, defence + attack) + k * 5000 for k in range(copies)]
    judged = torch.arange(5000 - test, 5000)
    parts = torch.arange(defence), torch.cat(painted), judged
    return Study(name, "parity", ("digit", "colour", "texture"), *map(data.at, parts))


def _faces(name: str, scale: Scale, other: str = "", correlation: str = "0") -> Study:
    sizes = scale["sizes"]["faces"]
    correlations = {(other, "smiling"): float(correlation)} if other else {}
    faces = generate_faces(sum(sizes), 48, correlations=correlations, seed=0)
    private = (other,) if other else ("glasses", "beard", "hair_colour")
    data = AuditData(faces.images, faces.labels)
    ends = [sum(sizes[:i]) for i in range(4)]
    parts = [data.at(torch.arange(a, b)) for a, b in zip(ends, ends[1:], strict=False)]
    return Study(name, "smiling", private, *parts)


def _celeba(name: str, scale: Scale, other: str = "", correlation: str = "0") -> Study:
    private = (other,) if other else celeba.PRIVATE
    names, attributes = ("train", "validation", "test"), (celeba.TASK, *private)
    parts = [
        celeba.load_celeba(scale.folder, part, attributes=attributes, most=size or None)
        for part, size in zip(names, scale["sizes"]["celeba"], strict=True)
    ]
    return Study(name, celeba.TASK, private, *parts)


def _lfw(name: str, scale: Scale) -> Study:
    train, test = (lfw.load_lfw(scale.folder, train=part) for part in (True, False))
    half = len(train) * 2 // 3
    parts = [train.at(torch.arange(half)), train.at(torch.arange(half, len(train))), test]
    return Study(name, lfw.TASK, lfw.PRIVATE, *_limited(parts, scale["sizes"]["lfw"]))


def _cifar10(name: str, scale: Scale) -> Study:
    train = cifar10.load_cifar10(scale.folder, train=True)
    test = cifar10.load_cifar10(scale.folder, train=False)
    size = scale["sizes"]["cifar10"][0]
    parts = [train.at(torch.arange(size)), train.at(torch.arange(size, len(train))), test]
    return Study(name, "living", ("class",), *_limited(parts, scale["sizes"]["cifar10"]))


def _limited(parts: list[AuditData], sizes: list[int]) -> list[AuditData]:
    return [
        part.at(torch.arange(min(size or len(part), len(part))))
        for part, size in zip(parts, sizes, strict=True)
    ]
