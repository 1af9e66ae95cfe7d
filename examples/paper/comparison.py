"""Tables 4 and 5, Fig. 10 and the Pareto picture: the filter, seven rivals and the controls.

python examples/paper/comparison.py [--scale cpu|paper] [--smoke] [--cached]
"""

from lab import plans
from lab.datasets import Study, load
from lab.intervals import over_seeds
from lab.pages import COLOURS, picture, published, verdict, write
from lab.runs import complete
from lab.scale import Scale, scale_from_command_line
from lab.tables import (
    CHOOSING,
    JUDGING,
    Line,
    difference_of_leaks,
    lines,
    markdown,
    notes,
    of_whole_seeds,
)

from prifu_plugin.audit.statistics import Interval
from prifu_plugin.figures import new_figure

PAPER = [
    ["baseline", 92.22, 15.61, 94.13, 51.39, 14.81],
    ["CI", 89.41, 15.02, 92.05, 27.40, 14.11],
    ["MaxEnt-ARL", 89.92, 15.48, 88.87, 24.18, 14.02],
    ["RAN", 89.73, 13.37, 88.41, 34.36, 12.97],
    ["PAN", 89.51, 12.88, 91.45, 25.18, 12.89],
    ["DISCO", 90.91, 11.59, 91.35, 24.87, 12.27],
    ["CFB", 91.35, 12.08, 88.61, 31.12, 12.25],
    ["NoPeek-Infer", 88.36, 14.70, 86.60, 33.53, 13.84],
    ["PriFU", 89.62, 11.33, 90.21, 21.83, 12.41],
]
MARGINS = (1.0, 1.5, 2.0, 2.5, 3.0)
"""Points of task accuracy within which methods are compared; the second decides the claims."""

RIVALS = ("CI", "MaxEnt-ARL", "RAN", "PAN", "DISCO", "CFB", "NoPeek-Infer")


METHODS = (
    *("plain", "PriFU", *RIVALS, "VIB", "noise"),
    *("bottleneck", "Shredder", "slimming", "untrained"),
)
"""In the order of colours and markers, the same in both pictures."""


def main() -> None:
    """Make every run of the comparison at every cut and say what holds."""
    scale, cached = scale_from_command_line(__doc__)
    study = load(scale["data"], scale)
    text = [
        f"Named in training, for the methods that need a name: {study.named}. A leak is the "
        "share of what the plain model gives away above the floor, in percent, with its "
        "interval over test images. Attackers see one upload of each image; where noise "
        "is drawn, a column tells what averages of repeated queries read. Lines within 1.5 points "
        "of the plain model's accuracy are compared in the claims below: the best setting of each "
        "side is chosen on half of the test images and judged on the other, with an interval over "
        "images and defence seeds. The column of seeds says how many have run and learned; a seed "
        "that not every setting has run is left out. The "
        "filter was tried in more forms than any rival has settings, which favours it.",
        "",
    ]
    for cut in scale["cuts"]:
        results = of_whole_seeds(complete(plans.comparison(scale, cut), scale, cached=cached))
        found, asked = lines(results), lines(results, "strongest")
        if not any(line.run["method"] == "plain" and not line.run["settings"] for line in found):
            continue
        ranked = sorted(found, key=lambda line: line.mean_leak(study.private))
        text += [f"## The {cut} cut", "", *markdown(ranked, study.private), ""]
        text += [
            pareto(scale, ranked, study, cut),
            "Numbers are the table's; the dotted line is the margin of accuracy; lines are at "
            "leaks of 0 and 100 %; methods that lost more than 10 points of the task are left out.",
            "",
        ]
        text += ["Attackers who see one upload of each image:", "", *claims(ranked, study), ""]
        text += [f"Attackers who may average {scale['queries']} queries of the same image:", ""]
        text += [*claims(asked, study), "", "Against no defence, and reconstruction:", ""]
        text += [*published_form(found, study), ""]
        text += ["Of what nobody named, one upload, by what accuracy counts as equal:", ""]
        text += [*by_margin(ranked, study), "", "The same, sixteen queries:", ""]
        text += [*by_margin(asked, study), ""]
        text += ["Leaks of what nobody named, on the judging half:", ""]
        text += [*averaged(ranked, asked, study), ""]
        text += ["What limits the evidence:", "", *notes(ranked), ""]
    head = ["method", "CelebA task", "PSNR", "CIFAR-10 task", "attack", "PSNR"]
    text += published(head, PAPER, "Tables 4 and 5, ResNet-18")
    write(scale, __file__, "Tables 4 and 5, Fig. 10: rivals and controls", text)


def within(found: list[Line], margin: float) -> tuple[Line, list[Line]]:
    """Return the plain line, and those that cost at most so many points of its accuracy."""
    plain = next(line for line in found if line.label == "plain")
    least = plain.task.value - margin / 100 - 1e-9  # counts of images, which floats blur
    return plain, [line for line in found if line.task.value >= least]


Pair = tuple[str, Line | None, Line | None]


def pairs(found: list[Line], names: tuple[str, ...], margin: float) -> list[Pair]:
    """Return who is compared on some attributes: the best of each side, on the choosing half."""
    plain, usable = within(found, margin)
    rivals = [line for line in usable if line.run["method"] in RIVALS]
    ours = [line for line in usable if line.run["method"] == "PriFU"]
    others = [line for line in usable if line not in (*ours, plain)]

    def best(group: list[Line]) -> Line | None:
        return min(group, key=lambda one: one.mean_leak(names, CHOOSING)) if group else None

    bare = best([line for line in ours if line.label == "PriFU"])
    return [
        ("as published, leaks less than any rival", bare, best(rivals)),
        ("best of ours, leaks less than any rival", best(ours), best(rivals)),
        ("best of ours, leaks less than any rival or control", best(ours), best(others)),
    ]


def claims(found: list[Line], study: Study, margin: float = MARGINS[1]) -> list[str]:
    """Return what the paper claims of the comparison, and what holds at equal task accuracy."""
    unnamed = tuple(name for name in study.private if name != study.named)
    said = []
    for names, what in ((unnamed, "nobody named"), ((study.named,), "rivals were told of")):
        for claim, mine, theirs in pairs(found, names, margin):
            if mine is None or theirs is None:
                said += [f"- Nothing to compare within {margin} points: PriFU, {claim}."]
                continue
            shown = "; ".join(
                f"{one.label} {one.mean_leak(names, JUDGING):.0f} (task {100 * one.task.value:.1f})"
                for one in (mine, theirs)
            )
            gap = difference_of_leaks(mine, theirs, names, JUDGING)
            seeds = min(mine.seeds, theirs.seeds)
            said += [verdict(gap, f"PriFU, {claim}, of what {what}:", f"{shown}.", seeds)]
    return said


def published_form(found: list[Line], study: Study) -> list[str]:
    """Return what the filter as published does against no defence, and to reconstruction."""
    plain, usable = within(found, MARGINS[1])
    bare = next((line for line in found if line.label == "PriFU"), None)
    if bare is None:
        return []
    said = [
        verdict(
            difference_of_leaks(bare, plain, (name,)),
            f"PriFU, as published, leaks less of {name} than no defence, of 100 %:",
            f"attack {100 * bare.cells[name].accuracy.value:.1f}, on plain "
            f"{100 * plain.cells[name].accuracy.value:.1f}.",
            min(bare.seeds, plain.seeds),
        )
        for name in study.private
    ]
    rivals = [line for line in usable if line.run["method"] in RIVALS]
    if rivals and bare.psnr == bare.psnr:
        hardest = min(rivals, key=lambda line: line.psnr)
        gap = over_seeds(bare.psnrs, hardest.psnrs)
        claim = "PriFU, as published, is harder to reconstruct from than any rival, dB:"
        shown = f"PSNR {bare.psnr:.2f}; {hardest.label} {hardest.psnr:.2f}."
        said += [verdict(gap, claim, shown, min(bare.seeds, hardest.seeds), digits=2)]
    return said


def by_margin(found: list[Line], study: Study) -> list[str]:
    """Return how the comparison depends on what accuracy counts as equal."""
    unnamed = tuple(name for name in study.private if name != study.named)
    rows = [
        "| points | rivals within | as published less best rival | best of ours less best rival "
        "| best of ours less best rival or control |",
        "|---|---|---|---|---|",
    ]
    known: dict[tuple[str, str], Interval] = {}
    for margin in MARGINS:
        inside = {line.run["method"] for line in within(found, margin)[1]} & set(RIVALS)
        cells = []
        for _, mine, theirs in pairs(found, unnamed, margin):
            if mine is None or theirs is None:
                cells.append("nothing to compare")
                continue
            pair = mine.label, theirs.label
            if pair not in known:
                known[pair] = difference_of_leaks(mine, theirs, unnamed, JUDGING)
            gap = known[pair]
            cells.append(f"{gap.value:.0f} [{gap.low:.0f}, {gap.high:.0f}], to {theirs.label}")
        who = ", ".join(name for name in RIVALS if name in inside) or "none"
        rows.append(f"| {margin} | {who} | " + " | ".join(cells) + " |")
    return rows


def averaged(once: list[Line], asked: list[Line], study: Study) -> list[str]:
    """Return what averages over queries read more of what nobody named, of useful settings."""
    unnamed = tuple(name for name in study.private if name != study.named)
    leaks = {line.label: line.mean_leak(unnamed, JUDGING) for line in asked}
    rows = ["| method | points lost | one upload | sixteen |", "|---|---|---|---|"]
    plain, usable = within(once, MARGINS[-1])
    for line in usable:
        lost = 100 * (plain.task.value - line.task.value)
        one = line.mean_leak(unnamed, JUDGING)
        rows.append(f"| {line.label} | {lost:.1f} | {one:.0f} | {leaks[line.label]:.0f} |")
    return rows


def pareto(scale: Scale, found: list[Line], study: Study, cut: str) -> str:
    """Draw leak against task accuracy; numbers are the table's, useless models are left out."""
    figure = new_figure(12, 5)
    grid = figure.subplots(1, len(study.private), squeeze=False)[0]
    least = 100 * next(line for line in found if line.label == "plain").task.value
    shown = [(n, line) for n, line in enumerate(found, 1) if 100 * line.task.value > least - 10]
    for axes, name in zip(grid, study.private, strict=True):
        for number, line in shown:
            if (leak := line.cells[name].leak) is None:
                continue
            place = METHODS.index(line.run["method"])
            x, y = 100 * line.task.value, 100 * leak.value
            up, down = max(100 * leak.high - y, 0), max(y - 100 * leak.low, 0)
            marker, colour = "osD^v"[place // len(COLOURS)], COLOURS[place % len(COLOURS)]
            axes.errorbar([x], [y], [[down], [up]], [50 * (line.task.high - line.task.low)],
                          lw=0.6, ms=5, marker=marker, color=colour,
                          label=line.run["method"])  # fmt: skip
            axes.annotate(str(number), (x, y), (3, 3), textcoords="offset points", fontsize=7)
        for level in (0, 100):
            axes.axhline(level, color="#999999", lw=0.7)
        axes.axvline(least - MARGINS[1], color="#999999", lw=0.7, ls=":")
        kind = "named in training" if name == study.named else "named by nobody"
        axes.set(title=f"{name}, {kind}", xlabel="task accuracy, %", ylabel="leak, %")
    handles, names = grid[0].get_legend_handles_labels()
    known = dict(zip(names, handles, strict=True))
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncol=8, fontsize=8)
    return picture(scale, figure, f"pareto-{cut}", f"Leak against task accuracy at the {cut} cut")


if __name__ == "__main__":
    main()
