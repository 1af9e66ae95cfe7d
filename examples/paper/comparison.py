"""Tables 4 and 5, Fig. 10 and the Pareto picture: the filter, seven rivals and the controls.

python examples/paper/comparison.py [--scale cpu|paper] [--smoke] [--cached]
"""

from lab import plans
from lab.datasets import Study, load
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
RIVALS = ("CI", "MaxEnt-ARL", "RAN", "PAN", "DISCO", "CFB", "NoPeek-Infer")


def main() -> None:
    """Make every run of the comparison at every cut and say what holds."""
    scale, cached = scale_from_command_line(__doc__)
    study = load(scale["data"], scale)
    text = [
        f"Named in training, for the methods that need a name: {study.named}. A leak is the "
        "share of what the plain model gives away above the floor, in percent, with its "
        "bootstrap interval over test images. Attackers see one upload of each image; where noise "
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
        text += [pareto(scale, ranked, study, cut)]
        text += ["Attackers who see one upload of each image:", "", *claims(ranked, study), ""]
        text += [f"Attackers who may average {scale['queries']} queries of the same image:", ""]
        text += [*claims(asked, study), "", "What limits the evidence:", "", *notes(ranked), ""]
    head = ["method", "CelebA task", "PSNR", "CIFAR-10 task", "attack", "PSNR"]
    text += published(head, PAPER, "Tables 4 and 5, ResNet-18")
    write(scale, __file__, "Tables 4 and 5, Fig. 10: rivals and controls", text)


def claims(found: list[Line], study: Study) -> list[str]:
    """Return what the paper claims of the comparison, and what holds at equal task accuracy."""
    unnamed = tuple(name for name in study.private if name != study.named)
    plain = next(line for line in found if line.label == "plain")
    usable = [line for line in found if line.task.value > plain.task.value - 0.015]
    rivals = [line for line in usable if line.run["method"] in RIVALS]
    bare = next((line for line in usable if line.label == "PriFU"), None)
    ours = [line for line in usable if line.run["method"] == "PriFU"]
    others = [line for line in usable if line not in (*ours, plain)]
    said = []
    for name, group, against in (
        ("as published", [bare] if bare else [], rivals),
        ("best of ours", ours, rivals),
        ("best of ours", ours, others),
    ):
        if not group or not against:
            said += [f"- Nothing {name} is within 1.5 points of the plain model's accuracy."]
            continue
        kind = "rival" if against is rivals else "rival or control"
        for names, what in ((unnamed, "nobody named"), ((study.named,), "rivals were told of")):
            mine, theirs = (
                min(lines, key=lambda one: one.mean_leak(names, CHOOSING))
                for lines in (group, against)
            )
            claim = f"PriFU, {name}, leaks less of what {what} than any {kind}:"
            a, b = (f"{one.label} {one.mean_leak(names, JUDGING):.0f}" for one in (mine, theirs))
            seeds, gap = min(mine.seeds, theirs.seeds), difference_of_leaks(mine, theirs, names)
            said += [verdict(gap, claim, f"{a}; {b}.", seeds)]
    return said


def pareto(scale: Scale, found: list[Line], study: Study, cut: str) -> str:
    """Draw leak against task accuracy; numbers are the table's, useless models are left out."""
    figure = new_figure(12, 5)
    grid = figure.subplots(1, len(study.private), squeeze=False)[0]
    plain = max(100 * line.task.value for line in found if line.run["method"] == "plain")
    shown = [(n, line) for n, line in enumerate(found, 1) if 100 * line.task.value > plain - 10]
    methods = list(dict.fromkeys(line.run["method"] for _, line in shown))
    for axes, name in zip(grid, study.private, strict=True):
        for number, line in shown:
            if (leak := line.cells[name].leak) is None:
                continue
            place = methods.index(line.run["method"])
            x, y = 100 * line.task.value, 100 * leak.value
            up, down = max(100 * leak.high - y, 0), max(y - 100 * leak.low, 0)
            marker, colour = "osD^v"[place // len(COLOURS)], COLOURS[place % len(COLOURS)]
            axes.errorbar([x], [y], [[down], [up]], [50 * (line.task.high - line.task.low)],
                          lw=0.6, ms=5, marker=marker, color=colour,
                          label=line.run["method"])  # fmt: skip
            axes.annotate(str(number), (x, y), (3, 3), textcoords="offset points", fontsize=7)
        axes.axhline(0, color="#999999", lw=0.7)
        kind = "named in training" if name == study.named else "named by nobody"
        axes.set(title=f"{name}, {kind}", xlabel="task accuracy, %", ylabel="leak, %")
    handles, names = grid[0].get_legend_handles_labels()
    known = dict(zip(names, handles, strict=True))
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncol=8, fontsize=8)
    return picture(scale, figure, f"pareto-{cut}", f"Leak against task accuracy at the {cut} cut")


if __name__ == "__main__":
    main()
