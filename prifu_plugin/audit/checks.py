"""What must hold before an audit begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from prifu_plugin.audit.data import AuditData, check_groups, check_labels
from prifu_plugin.audit.disjoint import check_disjoint
from prifu_plugin.audit.result import AuditReport
from prifu_plugin.errors import ConfigError, OrderError

FEW = 4
"""Items of a class below which nothing can be said of it."""


def check(
    edge: nn.Module,
    train: AuditData,
    test: AuditData,
    task: str,
    attributes: Sequence[str],
    references: Mapping[str, nn.Module | AuditReport],
    cloud: nn.Module | None,
) -> None:
    """Raise for modules in train mode, and for labels or images that do not fit."""
    if not isinstance(edge, nn.Module):
        raise ConfigError(f"edge is a {type(edge).__name__}: pass a torch.nn.Module, images -> z.")
    if not isinstance(task, str):
        raise ConfigError(f"task={task!r}: pass the name of one label, a string.")
    if not attributes:
        raise ConfigError("attributes is empty: name the private labels to attack.")
    if cloud is not None and not isinstance(cloud, nn.Module):
        raise ConfigError(f"'cloud' is a {type(cloud).__name__}: pass a module, z -> logits.")
    if not isinstance(references, Mapping):
        raise ConfigError(
            f"references is a {type(references).__name__}: pass a dictionary, such as "
            "{'plain': edge_of_the_plain_model}."
        )
    strange = [key for key in references if key not in ("plain", "untrained", "input")]
    if strange:
        raise ConfigError(f"The reference '{strange[0]}' is not 'plain', 'untrained' or 'input'.")
    for label, module in references.items():
        if not isinstance(module, nn.Module | AuditReport):
            raise ConfigError(
                f"'{label}' is a {type(module).__name__}: pass a module, images -> z (of a Split "
                "its edge), or what audit said of one."
            )
    used: dict[str, Any] = {"edge": edge, "cloud": cloud, **references}
    for label, given in used.items():
        if isinstance(given, nn.Module) and any(part.training for part in given.modules()):
            raise OrderError(
                f"The module given as '{label}' is in train mode: what it computes in use is "
                "something else. Call its eval() first."
            )
    for data, where in ((train, "train"), (test, "test")):
        _check_data(data, where)
        check_labels(data, [task, *attributes], where)
        if len(data) < 20:
            raise ConfigError(f"{where} has {len(data)} images: an audit needs hundreds.")
    if train.images.shape[1:] != test.images.shape[1:]:
        raise ConfigError(
            f"Images of train are {tuple(train.images.shape[1:])}, of test "
            f"{tuple(test.images.shape[1:])}: bring them to one shape."
        )
    _check_scales(train.images, test.images)
    check_groups(train, test)
    check_disjoint(train, test)
    for label in dict.fromkeys([task, *attributes]):
        _check_classes(label, train, test)


def _check_scales(train: Tensor, test: Tensor) -> None:
    """Raise if one was normalized and the other was not: attackers would read nothing there."""
    here, there = _some_values(train), _some_values(test)
    if _is_elsewhere(here, there):
        raise ConfigError(
            f"Images of train have a mean of {here.mean():.3g} and a deviation of {here.std():.3g},"
            f" of test {there.mean():.3g} and {there.std():.3g}: attackers that learn on one would "
            "be lost on the other. Prepare both alike."
        )


def _some_values(images: Tensor) -> Tensor:
    flat = images.detach().flatten()
    place = torch.linspace(0, len(flat) - 1, min(len(flat), 100_000), dtype=torch.float64).long()
    return flat[place.to(flat.device)].cpu().double()


def _is_elsewhere(a: Tensor, b: Tensor) -> bool:
    """Whether values are on another scale, by their deviation and by their quantiles.

    A few outliers change one of them alone, and so do images that are nearly all of one value.
    """
    ends = torch.tensor([0.05, 0.95], dtype=torch.float64)
    widths = [(float(x.std()), float(x.quantile(ends).diff())) for x in (a, b)]
    apart = abs(float(a.median() - b.median()))
    ratios = [max(pair) / max(min(pair), 1e-300) for pair in zip(*widths, strict=True)]
    return min(ratios) > 3 or apart > 2 * max(max(width) for width in widths) > 0


def _check_data(data: Any, where: str) -> None:
    if not isinstance(data, AuditData):
        raise ConfigError(
            f"{where} is a {type(data).__name__}: pass prifu_plugin.AuditData(images, labels)."
        )
    if not isinstance(data.images, Tensor):
        raise ConfigError(
            f"The images of {where} are a {type(data.images).__name__}: pass a tensor."
        )
    if data.images.ndim < 2:
        raise ConfigError(
            f"The images of {where} have shape {tuple(data.images.shape)}: pass (N, ...), at "
            "least (N, 1)."
        )
    if data.images.is_floating_point() and not torch.isfinite(data.images).all():
        raise ConfigError(
            f"Images of {where} hold NaN or infinite values: leave those images out, or mend them."
        )
    if not isinstance(data.labels, Mapping):
        raise ConfigError(
            f"The labels of {where} are a {type(data.labels).__name__}: pass a dictionary, name -> "
            "classes (N,)."
        )


def _check_classes(label: str, train: AuditData, test: AuditData) -> None:
    """Raise unless a label has classes that can be learned from one part and judged on another."""
    for data, where in ((train, "train"), (test, "test")):
        values = data.labels[label].long()
        classes = values.unique()
        if len(classes) < 2:
            raise ConfigError(f"Label '{label}' has one class only in {where}: nothing to infer.")
        counted = "items" if data.groups is None else "groups"
        for value in classes:
            has = values == value
            count = int(has.sum()) if data.groups is None else len(data.groups[has].unique())
            if count < FEW:
                raise ConfigError(
                    f"Class {int(value)} of '{label}' has fewer than {FEW} {counted} in {where}: "
                    "too few to learn it from, or to tell chance from a leak. Add some, or merge "
                    "it."
                )
    new = set(test.labels[label].tolist()) - set(train.labels[label].tolist())
    if new:
        raise ConfigError(
            f"Class {min(new)} of '{label}' is in test but not in train: no attacker "
            "can name it. Split so that every class is in both."
        )


def check_packages(suite: str, *, reconstructs: bool) -> None:
    """Raise ImportError before the work begins, rather than at its end."""
    needed = {"sklearn": suite != "quick", "torchmetrics": reconstructs}
    missing = [name for name, wanted in needed.items() if wanted and find_spec(name) is None]
    if missing:
        raise ImportError(
            f"This audit needs {' and '.join(missing)}: pip install 'prifu_plugin[audit]'. "
            "suite='quick' with reconstruct=False needs neither."
        )


def check_images(*parts: Tensor) -> None:
    """Raise ConfigError unless inputs are images in [0, 1], as reconstruction wants them."""
    for images in parts:
        if images.ndim != 4 or float(images.min()) < 0 or float(images.max()) > 1:
            raise ConfigError(
                f"Inputs of shape {tuple(images.shape[1:])} reach from {float(images.min()):.2f} "
                f"to {float(images.max()):.2f}: reconstruction wants images (N, C, H, W) with "
                "values in [0, 1]. Let the edge normalize, or pass reconstruct=False."
            )
