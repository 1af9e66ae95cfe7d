"""One private attribute: the strongest attack beside its floors, ceilings and controls."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prifu_plugin.audit.controls import CONSTANT, controls, marks_of, right_share
from prifu_plugin.audit.data import AuditData
from prifu_plugin.audit.inference import Inference, Prepared, infer
from prifu_plugin.audit.result import AttributeResult, AuditReport
from prifu_plugin.audit.statistics import (
    Interval,
    above_by_auc,
    area,
    leak,
    leaks,
    majority_guess,
    mean_interval,
    metrics,
    task_guess,
    task_scores,
)
from prifu_plugin.errors import ConfigError
from prifu_plugin.learned import is_above_chance


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What every attribute of an audit is judged on.

    Attributes:
        parts: data for training, choosing and judging attackers.
        answers: the task's answers for each of them.
        sent: uploads.
        repeated: means of repeated queries; None if there is nothing to average.
        others: what edges to compare with upload, by what they are.
        reports: earlier audits on the same data, by what they are.
        task: name of the task.
        constant: whether every image has the same upload.
        seeds: how many of the attacks.
        seed: the first of them.
    """

    parts: tuple[AuditData, ...]
    answers: tuple[Tensor, ...]
    sent: Prepared
    repeated: Prepared | None
    others: dict[str, Prepared]
    reports: dict[str, AuditReport]
    task: str
    constant: bool
    seeds: int
    seed: int

    def labels(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return a label for training, choosing and judging."""
        fitting, choosing, test = self.parts
        return fitting.labels[name], choosing.labels[name], test.labels[name]


def judge(label: str, evidence: Evidence) -> AttributeResult:
    """Attack one attribute and set what was read beside what is known without the upload."""
    labels, seed = evidence.labels(label), evidence.seed
    classes = int(max(int(y.max()) for y in labels)) + 1
    truth, groups = labels[2], evidence.parts[2].groups
    single = _attack(evidence, evidence.sent, labels, classes)
    found, used, repeated = _strongest(evidence, single, labels, classes)
    right, once = (right_share(attack, truth) for attack in (found, single))
    others = _others(evidence, label, labels, classes)
    majority, task_only, task_auc = _floors(evidence, labels)
    floor = majority if float(majority.mean()) > float(task_only.mean()) else task_only
    half, permuted = controls(used, labels, classes, seed, found[0].winner)
    first = metrics(found[0].scores, truth, seed, probable=found[0].probable, groups=groups)
    accuracy = mean_interval(right, seed, groups=groups)
    converged = all(one.converged for one in found)
    ceilings = {key: float(value.mean()) for key, value in others.items()}
    ceilings = _known_ceilings(evidence.reports, label) | ceilings
    ranked = above_by_auc(first.auc, task_auc)
    independent = len(truth if groups is None else groups.unique())
    marks = marks_of(accuracy, ranked, floor, ceilings, permuted, half, converged, independent)
    if evidence.constant:
        marks = (CONSTANT, *marks)
    truths = evidence.labels(evidence.task)[2]
    if not is_above_chance(float((evidence.answers[2] == truths).double().mean()), truths):
        marks = ("the model is at chance at its own task", *marks)
    marks = (*_of_the_task(evidence, labels), *marks)
    by_seed = tuple(float(right_share([one], truth).mean()) for one in found)
    leaked: Interval | None = None
    spread: tuple[float, ...] = ()
    if "plain" in others:
        leaked = leak(right, others["plain"], floor, seed, groups=groups)
    if leaked is not None:
        spread = leaks(by_seed, float(others["plain"].mean()), float(floor.mean()))
    asked = "mean of repeated queries, " if used is evidence.repeated else ""
    return AttributeResult(
        name=label,
        classes=classes,
        accuracy=accuracy,
        seeds=by_seed,
        balanced=first.balanced,
        auc=first.auc,
        task_auc=task_auc,
        gain=mean_interval(right - floor, seed, groups=groups),
        bits=first.bits,
        majority=float(majority.mean()),
        task_only=float(task_only.mean()),
        ceilings=ceilings,
        leak=leaked,
        leak_by_seed=spread,
        winner=asked + found[0].winner,
        converged=converged,
        half_data=half,
        permuted=permuted,
        once=float(once.mean()),
        repeated=repeated,
        marks=marks,
        tried={name: round(score, 4) for name, score in found[0].validation.items()},
        right=right,
        once_right=once,
        floor_right=floor,
    )


def _strongest(
    evidence: Evidence,
    single: list[Inference],
    labels: tuple[Tensor, Tensor, Tensor],
    classes: int,
) -> tuple[list[Inference], Prepared, float | None]:
    """Return the attack that is better on validation data, what it reads, and what queries give.

    It reads uploads as sent or means of repeated queries; last is the accuracy on those.
    """
    if evidence.repeated is None:
        return single, evidence.sent, None
    again = _attack(evidence, evidence.repeated, labels, classes)
    repeated = float(right_share(again, labels[2]).mean())
    if _best(again[0]) > _best(single[0]):
        return again, evidence.repeated, repeated
    return single, evidence.sent, repeated


def _attack(
    evidence: Evidence, uploads: Prepared, labels: tuple[Tensor, Tensor, Tensor], classes: int
) -> list[Inference]:
    """Choose an attacker with the first seed and train it anew with the others."""
    seed = evidence.seed
    first = infer(uploads, labels, classes, seed)
    others = range(1, evidence.seeds)
    return [first, *(infer(uploads, labels, classes, seed + k, first.winner) for k in others)]


def _best(found: Inference) -> float:
    return max(found.validation.values(), default=0.0)


def _others(
    evidence: Evidence, label: str, labels: tuple[Tensor, Tensor, Tensor], classes: int
) -> dict[str, Tensor]:
    """Return how often attacks on references are right, by test item."""
    found = {
        key: right_share([infer(uploads, labels, classes, evidence.seed)], labels[2])
        for key, uploads in evidence.others.items()
    }
    return found | _known(evidence.reports, label, len(labels[2]))


def _known(reports: dict[str, AuditReport], label: str, count: int) -> dict[str, Tensor]:
    """Return the outcomes of audits that were made before, by test item."""
    found = {}
    for key, report in reports.items():
        if key == "input":
            continue
        rows = [row for row in report.attributes if row.name == label]
        if not rows or len(rows[0].right) != count:
            raise ConfigError(
                f"The report '{key}' does not know '{label}' on these {count} test images: audit it"
                " on the same data in this session, or pass the edge itself."
            )
        found[key] = rows[0].right
    return found


def _known_ceilings(reports: dict[str, AuditReport], label: str) -> dict[str, float]:
    """Return what reports say of the images, and that on the plain model of an untrained one."""
    found = {}
    for key, among in (("input", reports), ("untrained", {"plain": reports.get("plain")})):
        rows = [row for report in among.values() if report for row in report.attributes]
        values = [r.ceilings[key] for r in rows if r.name == label and key in r.ceilings]
        if values:
            found[key] = max(values)
    return found


def _floors(
    evidence: Evidence, labels: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, float]:
    """Return whether the majority and the task's answer are right, and the latter's AUC."""
    learned, truth = torch.cat(labels[:2]), labels[2]
    known = torch.cat(evidence.answers[:2]), learned
    answers = evidence.answers[2]
    task_auc = area(task_scores(known, answers), truth)
    return majority_guess(learned, truth), task_guess(known, (answers, truth)), task_auc


def _of_the_task(evidence: Evidence, labels: tuple[Tensor, Tensor, Tensor]) -> tuple[str, ...]:
    """Mark a label that is the task under other names, or nearly."""
    tasks = evidence.labels(evidence.task)
    known = torch.cat(tasks[:2]), torch.cat(labels[:2])
    told = float(task_guess(known, (tasks[2], labels[2])).mean())
    majority = float(majority_guess(known[1], labels[2]).mean())
    if told == 1.0 > majority:
        return ("it is the task itself",)
    if told - majority > NEARLY * (1 - majority):
        return (f"it is nearly the task itself: the true answer tells {100 * told:.0f} % of it",)
    return ()


NEARLY = 0.9
"""Share of what the majority leaves open that the task's true answer may tell of a label."""
