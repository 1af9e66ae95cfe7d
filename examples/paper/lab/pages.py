"""Pages under docs/results/paper/: a title, how it was made, tables, pictures, what holds."""

from typing import Any

from matplotlib.figure import Figure

from lab.scale import Scale
from prifu_plugin.audit.statistics import Interval

COLOURS = ("#2e6f95", "#c8553d", "#588157", "#8d6a9f", "#b08900", "#5c677d", "#d4a5a5", "#1d3557")

SAID = ("- Holds", "- **Does not hold**", "- Not shown", "- Nothing", "Attackers who ", "## The ")
"""How the lines begin that say what holds, and under which conditions."""


LEGEND = """\
A leak is the share, in percent, of what the plain network of the same seed gives away above the
floor: 0 is the floor, 100 is no protection. "Nobody named" are the private labels that no method
was told of. Where a difference is given, it is the first leak less the second with a 95 % bootstrap
interval: a claim holds if all of it is below 0, does not hold if all of it is above, and is not
shown otherwise. Other claims compare means and have no interval. One seed is one training, an
observation."""


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


def verdict(holds: bool | Interval, claim: str, found: str, seeds: int) -> str:
    """Return a line that says whether a claim of the paper holds here.

    Args:
        holds: whether it does; or the interval of a difference that must be below 0, which leaves
            room for "not shown".
        claim: what is claimed.
        found: what was measured.
        seeds: of the defences that it was measured on, the fewest of those compared.
    """
    if isinstance(holds, Interval):
        shown = "Holds" if holds.high < 0 else "**Does not hold**" if holds.low > 0 else "Not shown"
        found += f" Difference {holds.value:.0f} [{holds.low:.0f}, {holds.high:.0f}]."
    else:
        shown = "Holds" if holds else "**Does not hold**"
    return f"- {shown}, {seeds} seed{'s' * (seeds != 1)}: {claim} {found}".rstrip()


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
