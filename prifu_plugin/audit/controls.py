"""What keeps a row of an audit from being evidence: controls, the sanity triple, convergence."""

from __future__ import annotations

import torch
from torch import Tensor

from prifu_plugin.audit.inference import Inference, Prepared, infer
from prifu_plugin.audit.statistics import FEWEST, Interval, half_width, majority_guess

BROKEN = "trained on permuted labels it is above the floor: something is wrong"
"""The mark of a control that failed: no figure of the row counts."""


CONSTANT = "the upload is constant: there is nothing to attack"
"""The mark of an upload that is the same for every image."""


def marks_of(
    accuracy: Interval,
    ranked: bool,
    floor: Tensor,
    ceilings: dict[str, float],
    permuted: float,
    half: float,
    converged: bool,
    count: int,
) -> tuple[str, ...]:
    """Name what keeps a row from being evidence: the sanity triple, convergence, size.

    Args:
        accuracy: of the strongest attacker.
        ranked: whether its scores order the images better than without the upload.
        floor: whether the best guess without the upload is right, by test item.
        ceilings: accuracy on other edges and on the images.
        permuted: accuracy after training on permuted labels.
        half: accuracy with half of the training data.
        converged: whether the winner's training had settled.
        count: of test items that are independent: images, or persons.
    """
    margin = half_width(accuracy.value, count)
    base = float(floor.mean())
    marks = []
    if count < FEWEST:
        marks.append(f"only {count} independent test items: no interval")
    plain = ceilings.get("plain")
    if count < FEWEST:  # nothing else can be told of so few
        pass
    elif base == 1.0:
        marks.append("the task's answer tells all of it: nothing is left to read")
    elif ranked:  # a rare attribute shows in the order of the scores alone
        pass
    elif plain is not None and plain < base + half_width(plain, count):
        marks.append("the suite reads nothing from the plain model either")
    elif all(
        value < base + half_width(value, count) for value in [accuracy.value, *ceilings.values()]
    ):
        marks.append("the suite reads it from nothing, not even from the images")
    elif plain is None and accuracy.value < base + margin:
        marks.append("no plain model was attacked: nothing shows that this suite could read it")
    if permuted > base + half_width(0.5, count) + 0.02:
        marks.append(BROKEN)
    strongest = max([accuracy.value, *(v for k, v in ceilings.items() if k != "input")])
    if ceilings.get("input", 1.0) < strongest - 2 * margin - 0.02:
        marks.append("the input gives away less than uploads: the suite is too weak for images")
    if not converged:
        marks.append("the winner was still learning: train longer")
    if accuracy.value - half > 2 * margin + 0.03:
        marks.append("half of the data reads clearly less: more data would read more")
    return tuple(marks)


def controls(
    prepared: Prepared, labels: tuple[Tensor, ...], classes: int, seed: int, winner: str
) -> tuple[float, float]:
    """Return the winner's accuracy with half of the data, and that of chance: permuted labels.

    Permuted labels check the scoring, not the strength of the attacker: least squares on the
    narrowest preparation is cheap enough to be fitted to ten permutations.
    """
    train, validation, truth = labels
    chosen = _half_of_each(train)
    half = infer(prepared.of(chosen), (train[chosen], validation, truth), classes, seed, winner)
    return float(right_share([half], truth).mean()), _permuted(prepared, labels, classes, seed)


def _half_of_each(labels: Tensor) -> Tensor:
    """Return the places of the first half of each class, in order."""
    members = [(labels == value).nonzero()[:, 0] for value in labels.unique()]
    return torch.cat([places[: (len(places) + 1) // 2] for places in members]).sort().values


def _permuted(prepared: Prepared, labels: tuple[Tensor, ...], classes: int, seed: int) -> float:
    """Return the mean accuracy of least squares over ten permutations of the training labels."""
    train, validation, truth = labels
    flat = [part for part in prepared.parts if not part[0].spatial]
    if not flat:
        return float(majority_guess(train, truth).mean())
    narrow = min(flat, key=lambda part: part[1].shape[1])
    uploads, only = (
        Prepared(prepared.suite, (narrow,), device=prepared.device),
        f"{narrow[0].name} ridge",
    )
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(10):
        mixed = train[torch.randperm(len(train), generator=generator)]
        others = validation[torch.randperm(len(validation), generator=generator)]
        control = infer(uploads, (mixed, others, truth), classes, 0, only)
        found.append(float(right_share([control], truth).mean()))
    return sum(found) / len(found)


def right_share(found: list[Inference], truth: Tensor) -> Tensor:
    """Return how often the attack is right, by test item, mean over seeds."""
    return torch.stack([(one.scores.argmax(1) == truth).double() for one in found]).mean(0)
