"""From results to lines of a table: means over seeds, leaks, intervals over test images."""

import functools
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lab.intervals import over_seeds_and_images
from lab.runs import unpacked
from prifu_plugin.audit.statistics import Interval, leak, mean_interval

Result = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """What attackers read of one attribute.

    Attributes:
        accuracy: of the strongest attack on one upload of each image, mean over seeds.
        floor: what is known from the task's answer or the majority.
        leak: share of what the plain model gives away above the floor, in percent; None if there
            is no plain run of the same seeds.
        spread: standard deviation of the leak over defence seeds, percent points; NaN for one.
        repeated: accuracy if the attacker may also average queries of the same image.
        seeds: of the defences, in the order of the rows below.
        right: whether the attack is right, by seed and test image, (S, N).
        floors: whether the floor's guess is.
        plain: whether the attack on the plain model is; None where the leak is.
    """

    accuracy: Interval
    floor: float
    leak: Interval | None
    spread: float
    repeated: float
    seeds: tuple[int, ...]
    right: Tensor
    floors: Tensor
    plain: Tensor | None

    @property
    def outcomes(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Attack, floor and the attack on the plain model."""
        return None if self.plain is None else (self.right, self.floors, self.plain)

    @property
    def above(self) -> Tensor:
        """Attack less floor, by seed and test image, (S, N)."""
        return self.right - self.floors

    def __str__(self) -> str:
        if self.leak is None:
            return f"{100 * self.accuracy.value:.1f}"
        low, high = (f"{100 * v:.0f}" for v in (self.leak.low, self.leak.high))
        return f"{100 * self.accuracy.value:.1f}, leak {100 * self.leak.value:.0f} [{low}, {high}]"


@dataclass(frozen=True)
class Line:
    """One method and setting, over its seeds.

    Attributes:
        label: what it is.
        run: of the first seed.
        seeds: how many.
        task: accuracy, with its interval over test images.
        cells: by attribute.
        psnr: of the best decoder, dB.
        ssim: likewise.
        bytes: of one upload.
        marks: what limits a cell as evidence.
        tasks: accuracy by seed.
        psnrs: of the best decoder by seed, dB.
    """

    label: str
    run: dict[str, Any]
    seeds: int
    task: Interval
    cells: dict[str, Cell]
    psnr: float
    ssim: float
    bytes: float
    marks: tuple[str, ...]
    tasks: dict[int, float]
    psnrs: dict[int, float]

    def mean_leak(self, names: tuple[str, ...], images: slice = slice(None)) -> float:
        """Return the mean leak over attributes, percent, on some of the test images."""
        cells = [self.cells[name] for name in names]
        if not all(cell.outcomes for cell in cells):
            return float("nan")
        above = [_above_floor(cell, list(cell.seeds))[..., images] for cell in cells]
        return statistics.mean(float(_share(one.mean((-2, -1)))) for one in above)


def of_whole_seeds(results: list[Result]) -> list[Result]:
    """Leave out seeds that fewer settings have run than others: means over other seeds differ."""
    runs: dict[int, set[tuple]] = {}
    for result in results:
        runs.setdefault(result["run"]["seed"], set()).add(_identity(result["run"]))
    most = max(map(len, runs.values()), default=0)
    return [result for result in results if len(runs[result["run"]["seed"]]) == most]


def lines(results: list[Result], seen: str = "once") -> list[Line]:
    """Group results by all but the seed; leaks are against "plain" on the same data and cut.

    Args:
        results: of runs.
        seen: what attackers see: "once", one upload of each image; "strongest", as many as help.
    """
    groups: dict[tuple, list[Result]] = {}
    for result in results:
        groups.setdefault(_identity(result["run"]), []).append(result)
    plains = {
        (*_place(r["run"]), r["run"]["seed"]): r
        for r in results
        if r["run"]["method"] == "plain" and not r["run"]["settings"]
    }
    groups = {key: _learned(group, plains) for key, group in groups.items()}
    return [_line(group, plains, seen) for group in groups.values()]


def above_floor(cells: list[Cell], less: list[Cell] | None = None) -> Interval:
    """Return what is read above the floor, mean over cells, percent points.

    Args:
        cells: of different data.
        less: of another method on the same data: the difference is returned.

    Returns:
        With an interval over defence seeds and test images.
    """
    seeds = _shared([*cells, *(less or [])])
    mine = [_rows(cell.above, cell, seeds) for cell in cells]
    theirs = [_rows(cell.above, cell, seeds) for cell in less] if less else None

    def mean(chosen: Tensor, *images: Tensor) -> float:
        found = [rows[chosen][:, i].mean() for rows, i in zip(mine, images, strict=True)]
        if theirs:
            other = [rows[chosen][:, i].mean() for rows, i in zip(theirs, images, strict=True)]
            found = [a - b for a, b in zip(found, other, strict=True)]
        return 100 * statistics.mean(map(float, found))

    return over_seeds_and_images(mean, len(seeds), *(rows.shape[1] for rows in mine))


def difference_of_accuracies(a: Cell, b: Cell) -> Interval:
    """Return how much more often attack a is right than b on the same images, percent points."""
    seeds = _shared([a, b])
    more = _rows(a.right, a, seeds) - _rows(b.right, b, seeds)

    def mean(chosen: Tensor, images: Tensor) -> float:
        return 100 * float(more[chosen][:, images].mean())

    return over_seeds_and_images(mean, len(seeds), more.shape[1])


UNREAD = "no plain model was attacked"
"""How the mark begins of an audit that was given no plain model as a reference."""

CHOOSING, JUDGING = slice(0, None, 2), slice(1, None, 2)
"""Halves of the test images: settings are chosen on one, and judged on the other."""


def difference_of_leaks(
    a: Line, b: Line, names: tuple[str, ...], images: slice = slice(None)
) -> Interval:
    """Return how much more of some attributes a leaks than b, percent points.

    The interval is over the defence seeds that both have and over test images.

    Args:
        a: one method.
        b: another on the same data.
        names: the attributes.
        images: which to judge on, where something was chosen on the others.
    """
    pairs = [(a.cells[name], b.cells[name]) for name in names]
    if not all(mine.outcomes and theirs.outcomes for mine, theirs in pairs):
        return Interval(float("nan"), float("nan"), float("nan"))
    seeds = _shared([cell for pair in pairs for cell in pair])
    # What is above the floor of an attack and of the plain model, of both methods: (K, 2, 2, S, N).
    above = torch.stack([
        torch.stack([_above_floor(cell, seeds)[..., images] for cell in pair]) for pair in pairs
    ])

    @functools.cache
    def of_seeds(chosen: tuple[int, ...]) -> Tensor:
        return above[..., list(chosen), :].mean(-2)

    def more(chosen: Tensor, drawn: Tensor) -> float:
        shares = _share(of_seeds(tuple(chosen.tolist()))[..., drawn].mean(-1))
        return float((shares[:, 0] - shares[:, 1]).mean())

    return over_seeds_and_images(more, len(seeds), above.shape[-1])


def _shared(cells: list[Cell]) -> list[int]:
    """Return the seeds that all cells have."""
    return sorted(set.intersection(*(set(cell.seeds) for cell in cells)))


def _rows(values: Tensor, cell: Cell, seeds: list[int]) -> Tensor:
    """Return the rows of some seeds."""
    return values[[cell.seeds.index(seed) for seed in seeds]]


def _above_floor(cell: Cell, seeds: list[int]) -> Tensor:
    """Return how much more often than the floor a method's attacker is right, and a plain one's.

    Shaped (2, S, N): for each seed and test image.
    """
    assert cell.outcomes
    right, floor, plain = (_rows(one, cell, seeds) for one in cell.outcomes)
    return torch.stack([right - floor, plain - floor])


def _share(above: Tensor) -> Tensor:
    """Return leaks in percent of two means (..., 2), NaN if the plain model is at the floor."""
    gained, whole = above.unbind(-1)
    return torch.where(whole > 0, 100 * gained / whole, torch.nan)


def label(run: dict[str, Any]) -> str:
    """Say what a run is."""
    words = [run["method"]]
    for key, value in run["settings"].items():
        name = {"form": "", "bits": "bits", "named": "naming"}.get(key, key.replace("_", " "))
        if value is True:
            words.append(name)
        elif key == "bits":
            words.append(f"{value} bits")
        else:
            words.append(f"{name} {value}".strip())
    return ", ".join(words)


def markdown(found: list[Line], private: tuple[str, ...]) -> list[str]:
    """Return a table, in the order given, its lines numbered as in pictures."""
    head = [
        "",
        "method",
        "seeds",
        "task",
        *private,
        "mean leak",
        "asked 16 times",
        "PSNR",
        "SSIM",
        "bytes",
    ]
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for place, line in enumerate(found, 1):
        cells = [str(line.cells[name]) for name in private]
        leaks = [line.cells[name] for name in private]
        mean = f"{line.mean_leak(private):.0f}" if all(c.leak for c in leaks) else ""
        asked = "/".join(f"{100 * c.repeated:.0f}" for c in leaks)
        again = asked if any(c.repeated > c.accuracy.value + 1e-9 for c in leaks) else ""
        task = f"{100 * line.task.value:.1f} ± {50 * (line.task.high - line.task.low):.1f}"
        rows.append(
            "| "
            + " | ".join(
                [
                    str(place),
                    line.label,
                    str(line.seeds),
                    task,
                    *cells,
                    mean,
                    again,
                    _shown(line.psnr, 2),
                    _shown(line.ssim, 3),
                    f"{line.bytes:.0f}",
                ]
            )
            + " |"
        )
    return rows


def _shown(value: float, digits: int) -> str:
    return "" if value != value else f"{value:.{digits}f}"


def notes(found: list[Line]) -> list[str]:
    """Return the marks of the audits, each with the lines it limits."""
    by: dict[str, list[str]] = {}
    for line in found:
        for mark in line.marks:
            by.setdefault(mark, []).append(line.label)
    return [f"- {mark}: {'; '.join(sorted(set(who)))}." for mark, who in sorted(by.items())]


def _learned(group: list[Result], plains: dict[tuple, Result]) -> list[Result]:
    """Leave out seeds that did not learn the task, unless none did: chance protects perfectly."""
    kept = []
    for result in group:
        plain = plains.get((*_place(result["run"]), result["run"]["seed"]))
        least = 0.7 * plain["report"]["utility"]["value"] if plain else 0.0
        if result["report"]["utility"]["value"] >= least:
            kept.append(result)
    if len(kept) == len(group):
        return group
    seeds = sorted(r["run"]["seed"] for r in group if r not in kept)
    mark = f"did not learn the task with seed {', '.join(map(str, seeds))}"
    mark += ", left out" if kept else ""
    return [{**result, "mark": mark} for result in kept or group]


def _line(group: list[Result], plains: dict[tuple, Result], seen: str) -> Line:
    run = group[0]["run"]
    reports = [result["report"] for result in group]
    pairs = [(r, plains.get((*_place(r["run"]), r["run"]["seed"]))) for r in group]
    names = [row["name"] for row in reports[0]["attributes"]]
    utilities = [report["utility"] for report in reports]
    task = Interval(*(statistics.mean(u[k] for u in utilities) for k in ("value", "low", "high")))
    pictures = [_best(report["reconstruction"]) for report in reports]
    cells = {name: _cell(name, pairs, seen) for name in names}
    marks = {
        f"{row['name']}: {mark}"
        for report in reports
        for row in report["attributes"]
        for mark in row["marks"]
        if not (mark.startswith(UNREAD) and cells[row["name"]].leak)  # the plain line shows it
    }
    marks |= {result["mark"] for result in group if "mark" in result}
    return Line(
        label(run),
        run,
        len(group),
        task,
        cells,
        statistics.mean(p for p, _ in pictures),
        statistics.mean(s for _, s in pictures),
        statistics.mean(report["upload"]["bytes"] for report in reports),
        tuple(sorted(marks)),
        {r["run"]["seed"]: u["value"] for r, u in zip(group, utilities, strict=True)},
        {r["run"]["seed"]: psnr for r, (psnr, _) in zip(group, pictures, strict=True)},
    )


def _cell(name: str, pairs: list[tuple[Result, Result | None]], seen: str) -> Cell:
    seeds = pairs[0][0]["report"]["settings"]["attack seeds"]
    mine = [unpacked(r["outcomes"][name][seen], seeds) for r, _ in pairs]
    strongest = [unpacked(r["outcomes"][name]["strongest"], seeds) for r, _ in pairs]
    floors = [unpacked(r["outcomes"][name]["floor"]) for r, _ in pairs]
    right, floor = torch.stack(mine).mean(0), torch.stack(floors).mean(0)
    accuracy = mean_interval(right)
    found, spread, undefended = None, float("nan"), None
    if all(plain is not None for _, plain in pairs):
        plains = [unpacked(p["outcomes"][name][seen], seeds) for _, p in pairs if p]
        found = leak(right, torch.stack(plains).mean(0), floor)
        undefended = torch.stack(plains) if found is not None else None
        each = [leak(m, p, f) for m, p, f in zip(mine, plains, floors, strict=True)]
        values = [100 * one.value for one in each if one]
        spread = statistics.stdev(values) if len(values) > 1 else spread
    again = max(float(torch.stack(strongest).mean()), accuracy.value)
    which = tuple(result["run"]["seed"] for result, _ in pairs)
    known = which, torch.stack(mine), torch.stack(floors), undefended
    return Cell(accuracy, float(floor.mean()), found, spread, again, *known)


def _best(found: dict[str, Any] | None) -> tuple[float, float]:
    if found is None:
        return float("nan"), float("nan")
    every = [*found["decoders"].values(), *([found["search"]] if found["search"] else [])]
    return max(s["psnr"] for s in every), max(s["ssim"] for s in every)


def _place(run: dict[str, Any]) -> tuple[str, str, str]:
    return run["data"], run["network"], run["cut"]


def _identity(run: dict[str, Any]) -> tuple:
    return (*_place(run), run["method"], str(sorted(run["settings"].items())))
