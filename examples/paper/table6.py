"""Table 6: private attributes that are correlated with the task.

python examples/paper/table6.py [--scale cpu|paper] [--smoke] [--cached]
"""

from lab import plans
from lab.pages import published, verdict, write
from lab.runs import complete
from lab.scale import scale_from_command_line
from lab.tables import Cell, Line, above_floor, lines, notes

from prifu_plugin.audit.statistics import Interval

PAPER = [
    ["smiling, then lipstick", "91.65, 81.62", "88.74, 59.47", "90.21, 67.59", "89.62, 62.18"],
    ["smiling, then cheekbones", "91.65, 84.93", "89.47, 80.75", "90.56, 81.45", "89.62, 83.15"],
    ["smiling, then cheekbones", "91.65, 84.93", "75.87, 65.56", "73.88, 71.41", "85.86, 81.90"],
]


def main() -> None:
    """Make the runs over correlations and say what is read above the task-only floor."""
    scale, cached = scale_from_command_line(__doc__)
    found = lines(complete(plans.correlated(scale), scale, cached=cached))
    text = [
        "The floor is the best guess from the task's own answer: what is above it was read from "
        "the upload. Its intervals, and those of differences in points, are over test images and "
        "defence seeds.",
        "",
        "| attribute | correlation | method | task | attack | floor | above it |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in found:
        _, name, correlation = line.run["data"].split(":")
        cell = line.cells[name]
        numbers = [100 * line.task.value, 100 * cell.accuracy.value, 100 * cell.floor]
        shown = " | ".join(f"{n:.1f}" for n in numbers)
        text += [
            f"| {name} | {correlation} | {line.label} | {shown} | {points(above_floor([cell]))} |"
        ]
    text += [""]
    head = ["labels", "ResNet-18", "CI", "MaxEnt-ARL", "PriFU"]
    text += published(head, PAPER, "Table 6, CelebA: task, then attack")
    if found:
        text += [*claims(found), "", *notes(found)]
    write(scale, __file__, "Table 6: correlated attributes", text, "faces")


def claims(found: list[Line]) -> list[str]:
    """Return what the paper claims of correlated attributes, by attribute, and what holds."""
    cells: dict[str, dict[str, list[Cell]]] = {}
    for line in found:
        name = line.run["data"].split(":")[1]
        cells.setdefault(name, {}).setdefault(line.run["method"], []).append(line.cells[name])
    seeds, said = min(line.seeds for line in found), []
    for name, by in cells.items():
        means = {method: above_floor(own).value for method, own in by.items()}
        shown = ", ".join(f"{method} {value:.1f}" for method, value in means.items())
        said += [
            verdict(
                above_floor(by["plain"]),
                f"the network without defence gives {name} away above the floor, in points:",
                "",
                seeds,
                above=0.0,
                shown="Mean",
                digits=1,
            ),
            verdict(
                above_floor(by["PriFU"], by["plain"]),
                f"the filter leaves less of {name} above the floor than no defence:",
                f"mean points above it: {shown}.",
                seeds,
                digits=1,
            ),
        ]
        said += [
            verdict(
                above_floor(by[told], by["PriFU"]),
                f"{told}, which is told of {name}, leaves less of it than the filter:",
                "",
                seeds,
                digits=1,
            )
            for told in ("CI", "MaxEnt-ARL")
        ]
    return said


def points(found: Interval) -> str:
    """Show percent points with their interval."""
    return f"{found.value:.1f} [{found.low:.1f}, {found.high:.1f}]"


if __name__ == "__main__":
    main()
