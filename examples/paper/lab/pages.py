"""Pages under docs/results/paper/: a title, how it was made, tables, pictures, what holds."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from lab.scale import Scale
from prifu_plugin.audit.statistics import Interval

COLOURS = ("#2e6f95", "#c8553d", "#588157", "#8d6a9f", "#b08900", "#5c677d", "#d4a5a5", "#1d3557")

SAID = (
    *("- Holds", "- **Does not hold**", "- Not shown", "- Nothing"),
    *("Attackers who ", "Against no ", "## The "),
)
"""How the lines begin that say what holds, and under which conditions."""


LEGEND = """\
A leak is the share, in percent, of what the plain network of the same seed gives away above the
floor: 0 is the floor, 100 is no protection, more than 100 is easier to read than without defence.
"Nobody named" are the private labels that no method was told of. Intervals are of 95 %. Of leaks
and attacks they are over defence seeds (Student's, of differences to the same seed) and test images
(bootstrap), added; of what was measured once a seed (the task, PSNR, open channels, correlations,
AvgRI) they are Student's over the seeds. With three seeds they are wide. A claim holds if all of
its intervals lie on the side of its bound that it names, does not hold if one lies wholly on the
other, and is not shown otherwise. There are dozens of claims, and no correction for their number:
one in forty would hold, and one in forty fail, by chance alone. Settings are chosen on other test
images than they are judged on, but with the same seeds; the rival hardest to reconstruct from is
chosen by what it is judged by. Everything is measured on small images and networks; the rivals on
coloured digits alone."""


def write(scale: Scale, script: str, title: str, parts: list[str], data: str = "") -> None:
    """Write a page; `script` names it and says how it was made, `data` if not on the scale's."""
    name = script.rsplit("/", 1)[-1].removesuffix(".py")
    command = f"python examples/paper/{name}.py --scale {scale.name}"
    text = [
        f"# {title}",
        "",
        f"`{command}`; data: {data or scale['data']}, seeds {scale['seeds']}, "
        f"{scale['attack_seeds']} attack seeds, suite {scale['suite']}.",
        "",
    ]
    file = scale.results / f"{name}-{scale.name}.md"
    file.write_text("\n".join(text + parts).rstrip() + "\n")
    print(f"{title}: {file}")


def published(head: list[str], rows: list[list[Any]], source: str) -> list[str]:
    """Return the paper's own numbers as a table."""
    lines = [f"The paper's numbers ({source}):", "", "| " + " | ".join(head) + " |"]
    lines += ["|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]


def picture(scale: Scale, figure: Figure, name: str, alt: str) -> str:
    """Save a picture beside its page and return the line that shows it."""
    file = f"{name}-{scale.name}.png"
    figure.savefig(scale.results / file, dpi=110, bbox_inches="tight")
    return f"![{alt}]({file})\n"


def verdict(
    holds: bool | Interval | Sequence[Interval],
    claim: str,
    found: str,
    seeds: int,
    *,
    below: float = 0.0,
    above: float | None = None,
    shown: str = "Difference",
    digits: int = 0,
) -> str:
    """Return a line that says whether a claim of the paper holds here.

    Args:
        holds: intervals that must all lie below (or above) a bound: the claim does not hold if one
            lies wholly on the other side, and is not shown otherwise. Or whether it holds, where
            nothing was sampled.
        claim: what is claimed.
        found: what was measured.
        seeds: of the defences that it was measured on, the fewest of those compared.
        below: the bound.
        above: the bound, if the intervals must lie above one.
        shown: what the intervals are of.
        digits: behind the point, of the intervals.
    """
    if isinstance(holds, bool):
        said = "Holds" if holds else "**Does not hold**"
    else:
        every = [holds] if isinstance(holds, Interval) else list(holds)
        said = _said(every, below, above)
        written = "; ".join(_written(one, digits) for one in every)
        plural = "s" if len(every) > 1 and not shown.endswith("s") else ""
        found += f"{' ' * bool(found)}{shown}{plural} {written}."
    return f"- {said}, {seeds} seed{'s' * (seeds != 1)}: {claim} {found}".rstrip()


def _said(intervals: Sequence[Interval], below: float, above: float | None) -> str:
    if above is not None:  # the mirror image
        intervals = [Interval(-one.value, -one.high, -one.low) for one in intervals]
        below = -above
    if intervals and all(one.high < below for one in intervals):
        return "Holds"
    return "**Does not hold**" if any(one.low > below for one in intervals) else "Not shown"


def _written(interval: Interval, digits: int) -> str:
    value, low, high = (f"{v:.{digits}f}" for v in (interval.value, interval.low, interval.high))
    return value if "nan" in low else f"{value} [{low}, {high}]"


def gathered(scale: Scale) -> str:
    """Write the page of claims: what every other page found to hold or not."""
    text = [f"# What holds of the paper at the scale {scale.name}", "", LEGEND, ""]
    target = scale.results / f"claims-{scale.name}.md"
    for file in sorted(set(scale.results.glob(f"*-{scale.name}.md")) - {target}):
        page = file.read_text().splitlines()
        said = [f"\n{line}\n" if line[0] != "-" else line for line in page if line.startswith(SAID)]
        said = [line.replace("## The", "### The") for line in said]
        if any(line.startswith("- ") for line in said):
            text += [f"## [{page[0].removeprefix('# ')}]({file.name})", "", *said, ""]
    target.write_text("\n".join(text).rstrip() + "\n")
    return str(target)
