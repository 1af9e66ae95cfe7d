"""Attribute inference (Algorithm 1 of the paper) by a suite: the strongest attacker is reported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from prifu_plugin.audit.attackers import (
    Fitted,
    Sample,
    boosting,
    convnet,
    logistic,
    mlp,
    neighbours,
    ridge,
    tail_of,
)
from prifu_plugin.audit.preparation import Preparation, as_they_are, is_spatial, maps, vectors
from prifu_plugin.audit.statistics import calibrated
from prifu_plugin.audit.tail import repurposed
from prifu_plugin.device import CPU
from prifu_plugin.errors import ConfigError

Attacker = Callable[[Sample, int], Fitted]
Part = tuple[Tensor, Tensor]
"""Uploads (N, ...) and private labels (N,)."""

PreparedPart = tuple[Preparation, Tensor, Tensor, Tensor]
"""A preparation, and training, validation and test uploads under it."""

MANY = 512
"""Values above which logistic regression and trees are left out, since they cost minutes."""

SUITES = ("standard", "quick", "full")


@dataclass(frozen=True)
class Inference:
    """What the attacker that was best on validation data says of test data.

    Attributes:
        scores: log-probabilities on test data, (N, K).
        probable: the same, calibrated on validation data.
        winner: its preparation and classifier.
        validation: accuracy of every attacker on validation data.
        converged: whether the winner's training had settled.
    """

    scores: Tensor
    probable: Tensor
    winner: str
    validation: dict[str, float]
    converged: bool


@dataclass(frozen=True)
class Prepared:
    """Uploads of training, validation and test data under every preparation of a suite.

    Attributes:
        suite: one of SUITES.
        parts: (preparation, training, validation, test uploads).
        tail: the task's layers behind the cut and the uploads as they take them, if it has several.
        device: where attackers' networks train.
    """

    suite: str
    parts: tuple[PreparedPart, ...]
    tail: tuple[nn.Module, PreparedPart] | None = None
    device: torch.device = CPU

    def of(self, chosen: Tensor) -> Prepared:
        """Return the same with some of the training uploads only."""
        parts = tuple((p, x[chosen], v, t) for p, x, v, t in self.parts)
        if self.tail is None:
            return replace(self, parts=parts)
        cloud, (preparation, x, v, t) = self.tail
        return replace(self, parts=parts, tail=(cloud, (preparation, x[chosen], v, t)))


def prepare(
    train: Tensor,
    validation: Tensor,
    test: Tensor,
    suite: str,
    cloud: nn.Module | None = None,
    device: torch.device = CPU,
) -> Prepared:
    """Fit a suite's preparations on training uploads and apply them; once for all attributes.

    Args:
        train: uploads that attackers are trained on.
        validation: uploads that they are chosen on.
        test: uploads that they are judged on.
        suite: one of SUITES.
        cloud: what takes the uploads in the task, which all but the quick suite repurpose.
        device: where attackers' networks train.

    Raises:
        ConfigError: for an unknown suite.
    """
    if suite not in SUITES:
        raise ConfigError(f"suite='{suite}': choose one of {', '.join(SUITES)}.")
    if not train[0].numel():
        return Prepared(suite, ())
    found = vectors(train, _names(train, suite))
    if suite != "quick" and (is_spatial(train) or train.ndim == 3):
        found += maps(train)
    parts = [(p, p.transform(train), p.transform(validation), p.transform(test)) for p in found]
    usable = tuple(part for part in parts if part[1].shape[1] > 0)
    if suite == "quick" or cloud is None or repurposed(cloud, train, 2) is None:
        return Prepared(suite, usable, device=device)
    tail = (cloud, (as_they_are(), train, validation, test))
    return Prepared(suite, usable, tail, device)


def infer(
    uploads: Prepared,
    labels: tuple[Tensor, Tensor, Tensor],
    classes: int,
    seed: int = 0,
    only: str | None = None,
) -> Inference:
    """Train every attacker of a suite, choose by validation data, and judge on test data.

    It ends early at an attacker that is right on all validation data. Where one class is most of
    them, attackers are chosen by AUC, and those with the same AUC by accuracy.

    Args:
        uploads: prepared uploads.
        labels: private labels of training, validation and test data.
        classes: K.
        seed: of the networks.
        only: the one attacker to train, by the name in `Inference.winner`.

    Example:
        >>> s = torch.arange(120) % 2
        >>> z = torch.randn(120, 3, generator=torch.Generator().manual_seed(0)) + 9 * s[:, None]
        >>> uploads = prepare(z[:60], z[60:90], z[90:], "quick")
        >>> found = infer(uploads, (s[:60], s[60:90], s[90:]), 2)
        >>> float((found.scores.argmax(1) == s[90:]).double().mean())
        1.0
    """
    train, validation, test = labels
    if not uploads.parts:
        # Constant uploads: the prior is all an attacker has.
        told = _prior(train, classes).log().expand(len(test), -1)
        return Inference(told, told, "the prior", {}, True)
    scores: dict[str, float] = {}
    best: tuple[tuple[float, float], str, Fitted, Tensor, Tensor] | None = None
    for attacker, part in _plan(uploads):
        preparation, x, x_validation, x_test = part
        name = f"{preparation.name} {attacker.__name__}"
        if only not in (None, name):
            continue
        sample = Sample(x, train, x_validation, validation, classes, uploads.device)
        fitted = attacker(sample, seed)
        scores[name], accuracy = sample.judged(fitted.classify)
        if best is None or (scores[name], accuracy) > best[0]:
            best = ((scores[name], accuracy), name, fitted, x_validation, x_test)
        if best[0] == (1.0, 1.0):  # right every time: nothing is left for a costlier attacker
            break
    assert best is not None
    _, winner, fitted, x_validation, x_test = best
    told = fitted.classify(x_test)
    prior = _prior(train, classes)
    probable = calibrated(told, fitted.classify(x_validation), validation, prior)
    return Inference(told, probable, winner, scores, fitted.converged)


def _prior(labels: Tensor, classes: int) -> Tensor:
    """Return the share of each class, (K,), none of them 0."""
    return (labels.bincount(minlength=classes).double() + 1e-3) / (len(labels) + 1e-3 * classes)


def _plan(uploads: Prepared) -> list[tuple[Attacker, PreparedPart]]:
    """Return what to train on what, the cheap before the costly."""
    costs: list[Attacker] = [ridge, neighbours, logistic, mlp, boosting]
    pairs = [
        (attacker, part)
        for part in uploads.parts
        for attacker in _attackers(part[0], uploads.suite, part[1].shape[1])
    ]
    if uploads.tail is not None:
        cloud, part = uploads.tail
        pairs.append((tail_of(cloud), part))
    order = {attacker: place for place, attacker in enumerate(costs)}
    return sorted(pairs, key=lambda pair: order.get(pair[0], len(order)))


def _names(z: Tensor, suite: str) -> tuple[str, ...]:
    if suite == "quick":
        return ("standardized", "whitened", "whitened fully")
    known = ("standardized", "whitened", "whitened fully")
    return ("raw", *known, "ranked") if z.ndim == 2 or suite == "full" else known


def _attackers(preparation: Preparation, suite: str, width: int) -> list[Attacker]:
    if preparation.spatial:
        return [convnet]
    if suite == "quick":
        return [ridge, mlp]
    if suite == "full":
        return [ridge, mlp, neighbours, boosting, *([logistic] if width <= MANY else [])]
    if width > MANY:
        return [ridge, mlp, neighbours]
    if preparation.name.endswith("standardized"):
        return [ridge, logistic, mlp, neighbours, boosting]
    if "whitened" in preparation.name:
        return [ridge, logistic, mlp, neighbours]
    return [ridge, mlp]
