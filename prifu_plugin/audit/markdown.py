"""Audit reports as Markdown tables, which terminals show too."""

from __future__ import annotations

from collections.abc import Sequence

from prifu_plugin.audit.reconstruction import Reconstruction
from prifu_plugin.audit.result import AttributeResult, AuditReport
from prifu_plugin.audit.words import upload_in_words, verdict


def markdown(reports: Sequence[AuditReport]) -> str:
    """Return reports of the same attributes as Markdown."""
    lines = []
    for report in reports:
        lines += [
            f"## {report.name}",
            "",
            f"task {report.task}: {report.utility or 'not measured'}; "
            f"{upload_in_words(report)}; attackers trained on {report.sizes[0]} images, chosen on "
            f"{report.sizes[1]}, judged on {report.sizes[2]}",
            "",
            *_read(report.attributes),
            "",
            *_beside(report.attributes),
            "",
        ]
        if report.reconstruction is not None:
            lines += [*_reconstructed(report.reconstruction), ""]
        settings = ", ".join(f"{name} {value}" for name, value in report.settings.items())
        lines += [f"Not tested: {'; '.join(report.not_tested)}.", "", f"Settings: {settings}.", ""]
    lines.append("Empirical: a stronger attacker may read more.")
    return "\n".join(lines) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    escaped = ([cell.replace("|", r"\|") for cell in cells] for cells in lines)
    return ["| " + " | ".join(cells) + " |" for cells in escaped]


def each(values: Sequence[float]) -> str:
    """Return figures with commas between."""
    return ", ".join(f"{value:.3f}" for value in values)


def _read(rows: Sequence[AttributeResult]) -> list[str]:
    """Say what is read of each attribute, and what that means."""
    head = ["attribute", "read", "by seed", "floor", "leak", "leak by seed", "verdict"]
    head += ["strongest attacker"]
    cells = [
        [
            row.name,
            str(row.accuracy),
            each(row.seeds),
            f"{row.floor:.3f}",
            str(row.leak or ""),
            each(row.leak_by_seed),
            "; ".join([verdict(row), *row.marks]),
            row.winner,
        ]
        for row in rows
    ]
    return table(head, cells)


def _beside(rows: Sequence[AttributeResult]) -> list[str]:
    """Give what the reading is to be compared with: floors apart, ceilings, other measures."""
    ceilings = list(dict.fromkeys(name for row in rows for name in row.ceilings))
    head = ["attribute", "balanced", "AUC", "bits", "floor: most frequent", "floor: task's answer"]
    head += [f"ceiling: {name}" for name in ceilings]
    head += ["half the data", "permuted labels", "mean of repeated queries"]
    cells = []
    for row in rows:
        measures = [f"{row.balanced:.3f}", str(row.auc), f"{row.bits:.2f}"]
        floors = [f"{row.majority:.3f}", f"{row.task_only:.3f}"]
        tops = [_shown(row.ceilings.get(name)) for name in ceilings]
        checks = [f"{row.half_data:.3f}", f"{row.permuted:.3f}", _shown(row.repeated)]
        cells.append([row.name, *measures, *floors, *tops, *checks])
    return table(head, cells)


def _reconstructed(found: Reconstruction) -> list[str]:
    tried = {f"decoder, {name}": result for name, result in found.decoders.items()}
    if found.search is not None:
        tried["search against the edge, 16 images"] = found.search
    if found.search_floor is not None:
        tried["floor: the mean image on those 16"] = found.search_floor
    tried["floor: the mean image"] = found.mean_image
    tried["floor: the mean image of the task's answer"] = found.task_mean
    cells = [[name, f"{value.psnr:.2f}", f"{value.ssim:.3f}"] for name, value in tried.items()]
    near = [f"{100 * share:.1f} % among the {k} nearest" for k, share in found.retrieval.items()]
    return [
        *table(["reconstruction, peak 1", "PSNR, dB", "SSIM"], cells),
        "",
        f"Nearest to their own reconstruction: {100 * found.linkage:.1f} % of the test images "
        f"(chance {100 * found.chance:.1f} %)" + "".join(f"; {part}" for part in near[1:]) + ".",
    ]


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
