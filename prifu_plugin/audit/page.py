"""Audit reports as one self-contained page with pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from importlib import resources
from typing import Any

from prifu_plugin.audit.result import AuditReport
from prifu_plugin.audit.words import upload_in_words, verdict
from prifu_plugin.errors import ConfigError
from prifu_plugin.figures import new_figure


def html(reports: Sequence[AuditReport], title: str = "Privacy audit") -> str:
    """Return reports of the same attributes as one page: no scripts, no other files.

    Raises:
        ConfigError: if the reports are of different attributes, or there is none.
        ImportError: if jinja2 or matplotlib is missing.
    """
    names = [[row.name for row in report.attributes] for report in reports]
    if not names or any(other != names[0] for other in names):
        raise ConfigError("A page compares reports of the same attributes; render others apart.")
    try:
        from jinja2 import Environment
    except ImportError as error:
        raise ImportError("The page needs jinja2: pip install 'prifu_plugin[audit]'") from error
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    source = resources.files("prifu_plugin.audit").joinpath("templates/report.html")
    page = environment.from_string(source.read_text(encoding="utf-8"))
    return page.render(
        title=title,
        reports=reports,
        attributes=names[0],
        verdict=verdict,
        upload_in_words=upload_in_words,
        bars=_picture(_bars(reports)),
        bubbles=_picture(_bubbles(reports)),
        galleries=[_picture(_gallery(report), "png") for report in reports],
    )


def _bars(reports: Sequence[AuditReport]) -> Any:
    figure = new_figure(
        9, 0.6 + 0.34 * sum(len(r.attributes) for r in reports) + 0.3 * len(reports)
    )
    axes = figure.subplots()
    places, labels, at = [], [], 0.0
    for report in reports:
        for row in report.attributes:
            axes.barh(at, row.accuracy.value, color=_COLOURS["bar"], height=0.7)
            axes.plot([row.accuracy.low, row.accuracy.high], [at, at], color="#c44e3c", lw=2)
            axes.plot([row.floor] * 2, [at - 0.4, at + 0.4], color="black", lw=2)
            if "plain" in row.ceilings:
                axes.plot([row.ceilings["plain"]], [at], "|", color="#666666", ms=12)
            places.append(at)
            labels.append(_literal(f"{report.name}: {row.name}"))
            at += 1
        at += 0.6
    axes.set_yticks(places, labels, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.02), xlabel="accuracy of the strongest attacker")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _bubbles(reports: Sequence[AuditReport]) -> Any:
    """Draw two attributes against each other, the area being the task's accuracy (Figs. 9, 10)."""
    shown = [report for report in reports if report.utility is not None]
    names = [row.name for row in reports[0].attributes]
    pairs = list(zip(names, names[1:], strict=False))[:3]
    if len(shown) < 2 or not pairs:
        return None
    figure = new_figure(4.2 * len(pairs) + 0.6, 4)
    grid = figure.subplots(1, len(pairs), squeeze=False)[0]
    lowest = min(report.utility.value for report in shown if report.utility)
    highest = max(report.utility.value for report in shown if report.utility)
    dots: dict[str, Any] = {}  # by hand: a legend leaves out labels that begin with _
    for axes, pair in zip(grid, pairs, strict=True):
        for place, report in enumerate(shown):
            assert report.utility is not None
            rows = {row.name: row for row in report.attributes}
            share = (report.utility.value - lowest) / max(highest - lowest, 1e-9)
            x, y = (rows[name].accuracy.value for name in pair)
            label = _literal(f"{place + 1} {report.name} ({report.utility.value:.2f})")
            dots[label] = axes.scatter([x], [y], s=60 + 340 * share, alpha=0.5)
            axes.annotate(str(place + 1), (x, y), ha="center", va="center", fontsize=8)
        first = {row.name: row for row in reports[0].attributes}
        axes.axvline(first[pair[0]].floor, color="black", lw=1, ls=":")
        axes.axhline(first[pair[1]].floor, color="black", lw=1, ls=":")
        axes.set(xlabel=_literal(f"{pair[0]}, read"), ylabel=_literal(f"{pair[1]}, read"))
        axes.margins(0.2)
        axes.spines[["top", "right"]].set_visible(False)
    legend = figure.legend(
        list(dots.values()), list(dots), loc="outside lower center", ncols=3, fontsize=8
    )
    for handle in legend.legend_handles:
        handle.set_sizes([30])
    return figure


def _literal(text: str) -> str:
    """Return text that matplotlib does not take for a formula."""
    return text.replace("$", r"\$")


def _gallery(report: AuditReport) -> Any:
    found = report.reconstruction
    if found is None or found.images.ndim != 5 or found.images.shape[2] not in (1, 3):
        return None
    rows = found.images
    figure = new_figure(1.1 * rows.shape[1], 2.3)
    grid = figure.subplots(2, rows.shape[1], squeeze=False)
    for row, images in zip(grid, rows, strict=True):
        for axes, image in zip(row, images, strict=True):
            pixels = image.permute(1, 2, 0).squeeze(-1).clamp(0, 1).numpy()
            axes.imshow(pixels, cmap="gray", vmin=0, vmax=1)
            axes.axis("off")
    return figure


_COLOURS = {"bar": "#9db9cf"}


def _picture(figure: Any, kind: str = "svg") -> Any:
    """Return a figure as markup that needs no other file; "" for None."""
    from markupsafe import Markup

    if figure is None:
        return ""
    file = io.BytesIO()
    figure.savefig(file, format=kind, dpi=110, metadata={"Date": None} if kind == "svg" else None)
    if kind == "svg":
        text = file.getvalue().decode()
        return Markup(text[text.index("<svg") :])  # noqa: S704 - made by matplotlib just now
    coded = base64.b64encode(file.getvalue()).decode()
    return Markup(
        f'<img alt="true images above, reconstructions below" src="data:image/png;base64,{coded}">'
    )  # noqa: S704
