"""An audit in words: what a row shows, and what is uploaded."""

from __future__ import annotations

from prifu_plugin.audit.controls import BROKEN, CONSTANT
from prifu_plugin.audit.result import RANKED, AttributeResult, AuditReport
from prifu_plugin.audit.statistics import above_by_auc


def verdict(row: AttributeResult) -> str:
    """Say in words what a row shows."""
    if row.accuracy.low != row.accuracy.low:
        return "too few items to say"
    if BROKEN in row.marks:
        return "no evidence: the control failed"
    if CONSTANT in row.marks:
        return "no evidence either way"
    if row.gain.low > 0:
        return "leaks: read above the floor"
    if above_by_auc(row.auc, row.task_auc):
        return "leaks: ranked above the floor, by AUC"
    if row.marks:
        return "no evidence either way"
    return "not read above the floor by these attackers"


def upload_in_words(report: AuditReport) -> str:
    """Say how large an upload is, next to the image, and what it can hold."""
    upload = report.upload
    said = [f"{upload.bytes} bytes a sample"]
    others = {"in fp32": upload.bytes_as_float, **_named(upload.bytes_as_image)}
    compared = [f"{value:.0f} {name}" for name, value in others.items() if value]
    said[0] += f" ({', '.join(compared)})" if compared else ""
    said.append(f"{upload.constant} of {upload.values} values constant")
    images = min(report.sizes[0], RANKED)
    said.append(f"rank {'at least ' if upload.rank >= images - 1 else ''}{upload.rank}")
    if upload.rank:
        said[-1] += f", the strongest direction {upload.condition:.3g} times the weakest"
    if upload.bits is not None:
        said.append(f"at most {upload.bits:.0f} bits a query")
    return ", ".join(said)


def _named(sizes: dict[str, float]) -> dict[str, float]:
    names = {"png": "the image as PNG", "jpeg": "as JPEG"}
    return {names[key]: value for key, value in sizes.items() if key in names}
