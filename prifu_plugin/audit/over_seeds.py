"""Audits of one defence that was trained several times: what training leaves open."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from prifu_plugin.audit.markdown import each, table
from prifu_plugin.audit.result import AttributeResult, AuditReport
from prifu_plugin.audit.words import verdict
from prifu_plugin.errors import ConfigError


@dataclass(frozen=True)
class AttributeOverSeeds:
    """What attackers read of one attribute, by defence seed.

    Attributes:
        name: of the attribute.
        accuracy: of the strongest attacker on each network.
        floor: the better floor of each.
        leak: share of what the plain model gives away, of each; None where none is known.
        verdicts: what each report says in words.
    """

    name: str
    accuracy: tuple[float, ...]
    floor: tuple[float, ...]
    leak: tuple[float | None, ...]
    verdicts: tuple[str, ...]

    @property
    def read(self) -> int:
        """On how many networks the attribute is read above the floor."""
        return sum(said.startswith("leaks") for said in self.verdicts)


@dataclass(frozen=True)
class OverSeeds:
    """Audits of one defence, trained with several seeds.

    Attributes:
        names: of the reports, in order.
        task: name of the task.
        utility: the task's accuracy on each network; None where no cloud was given.
        attributes: by private attribute.
    """

    names: tuple[str, ...]
    task: str
    utility: tuple[float | None, ...]
    attributes: tuple[AttributeOverSeeds, ...]

    def to_markdown(self) -> str:
        """Return a Markdown table: means, standard deviations, and each network's figure."""
        head = ["", "mean", "deviation", "by network", "floor", "leak", "by network", "read above"]
        rows = [[f"task: {self.task}", *_columns(self.utility), "", "", "", ""]]
        for one in self.attributes:
            leak = _columns(one.leak)
            deviation = f" ± {leak[1]}" if leak[1] else ""
            floor = f"{statistics.mean(one.floor):.3f}"
            counted = f"{one.read} of {len(one.verdicts)}"
            read = _columns(one.accuracy)
            rows.append([one.name, *read, floor, leak[0] + deviation, leak[2], counted])
        count = len(self.names)
        note = f"{count} networks: {', '.join(self.names)}. The deviation is over networks alone."
        return "\n".join([*table(head, rows), "", note]) + "\n"

    def __rich__(self) -> Any:
        """Return what `rich.print` draws."""
        from rich.markdown import Markdown

        return Markdown(self.to_markdown())

    def __str__(self) -> str:
        return self.to_markdown()


def over_seeds(reports: Sequence[AuditReport]) -> OverSeeds:
    """Set audits of one defence beside each other, one for each seed it was trained with.

    The intervals of a report are over test images; how far another training of the same defence
    would land is often more than that, and only other trainings show it.

    Args:
        reports: at least two, of the same task and attributes on the same data; `from_json` ones
            will do. Leaks are those of the reports: give each its own plain model as reference.

    Raises:
        ConfigError: if there are fewer than two, or they are of other data, tasks or attributes.

    Example:
        >>> import torch
        >>> import prifu_plugin as prifu
        >>> g = torch.Generator().manual_seed(0)
        >>> x, s = torch.rand(600, 1, 8, 8, generator=g), torch.arange(600) % 2
        >>> x[s == 1] += 0.2
        >>> data = prifu.AuditData(x, {"task": (x.mean((1, 2, 3)) * 9).long() % 2, "bright": s})
        >>> parts = data.at(torch.arange(400)), data.at(torch.arange(400, 600))
        >>> reports = [
        ...     prifu.audit(edge.eval(), *parts, task="task", attributes=["bright"],
        ...                 suite="quick", seeds=1, reconstruct=False)
        ...     for edge in (torch.nn.Flatten(), torch.nn.Flatten())
        ... ]
        >>> over_seeds(reports).attributes[0].read
        2
    """
    if isinstance(reports, AuditReport) or not isinstance(reports, Iterable):
        raise ConfigError(
            f"reports is a {type(reports).__name__}: pass a list of what prifu_plugin.audit "
            "returned for each seed."
        )
    reports = tuple(reports)
    _check(reports)
    first = reports[0]
    rows = [[report.attributes[at] for report in reports] for at in range(len(first.attributes))]
    utility = tuple(None if r.utility is None else r.utility.value for r in reports)
    names = tuple(report.name for report in reports)
    return OverSeeds(names, first.task, utility, tuple(map(_of, rows)))


def _check(reports: Sequence[Any]) -> None:
    odd = next((r for r in reports if not isinstance(r, AuditReport)), None)
    if odd is not None:
        raise ConfigError(
            f"over_seeds got a {type(odd).__name__} among the reports: pass what "
            "prifu_plugin.audit returned, or AuditReport.from_json(text)."
        )
    if len(reports) < 2:
        raise ConfigError(
            f"over_seeds got {len(reports)} reports: train the same defence with two seeds or "
            "more, and audit each."
        )
    for what, of in _SAME.items():
        found = {of(report) for report in reports}
        if len(found) > 1:
            raise ConfigError(
                f"The reports differ in their {what} ({' and '.join(map(str, found))}): figures of "
                "one defence are comparable only where nothing but its seed changes."
            )


_SAME: dict[str, Callable[[AuditReport], Any]] = {
    "task": lambda report: report.task,
    "attributes": lambda report: tuple(row.name for row in report.attributes),
    "data": lambda report: report.settings.get("data"),
    "suite": lambda report: report.settings.get("suite"),
    "queries": lambda report: report.settings.get("queries"),
}
"""What reports must share."""


def _of(rows: Sequence[AttributeResult]) -> AttributeOverSeeds:
    return AttributeOverSeeds(
        rows[0].name,
        tuple(row.accuracy.value for row in rows),
        tuple(row.floor for row in rows),
        tuple(None if row.leak is None else row.leak.value for row in rows),
        tuple(map(verdict, rows)),
    )


def _columns(values: Sequence[float | None]) -> list[str]:
    """Return mean, standard deviation and single values, of those that are known."""
    known = [value for value in values if value is not None]
    if not known:
        return ["", "", ""]
    spread = f"{statistics.stdev(known):.3f}" if len(known) > 1 else ""
    shown = ", ".join("none" if v is None else each([v]) for v in values)
    return [f"{statistics.mean(known):.3f}", spread, shown]
