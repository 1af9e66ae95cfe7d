"""Table 6: private attributes that are correlated with the task.

python examples/paper/table6.py [--scale cpu|paper] [--smoke] [--cached]
"""

from lab import plans
from lab.pages import published, verdict, write
from lab.runs import complete
from lab.scale import scale_from_command_line
from lab.tables import Cell, above_floor, lines

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
    cells: dict[str, list[Cell]] = {}
    for line in found:
        _, name, correlation = line.run["data"].split(":")
        cell = line.cells[name]
        cells.setdefault(line.run["method"], []).append(cell)
        numbers = [100 * line.task.value, 100 * cell.accuracy.value, 100 * cell.floor]
        shown = " | ".join(f"{n:.1f}" for n in numbers)
        text += [
            f"| {name} | {correlation} | {line.label} | {shown} | {points(above_floor([cell]))} |"
        ]
    text += [""]
    head = ["labels", "ResNet-18", "CI", "MaxEnt-ARL", "PriFU"]
    text += published(head, PAPER, "Table 6, CelebA: task, then attack")
    if found:
        text += claims(cells, min(line.seeds for line in found))
    write(scale, __file__, "Table 6: correlated attributes", text, "faces")


def claims(cells: dict[str, list[Cell]], seeds: int) -> list[str]:
    """Return what the paper claims of correlated attributes, and what holds."""
    means = {method: above_floor(found).value for method, found in cells.items()}
    shown = ", ".join(f"{method} {value:.1f}" for method, value in means.items())
    told = min(("CI", "MaxEnt-ARL"), key=lambda method: means[method])
    return [
        verdict(
            above_floor(cells["PriFU"], cells["plain"]),
            "the filter leaves less above the floor than no defence:",
            f"mean points above it: {shown}.",
            seeds,
        ),
        verdict(
            above_floor(cells[told], cells["PriFU"]),
            "methods that are told the attribute leave less of it than the filter:",
            f"least of them: {told}.",
            seeds,
        ),
    ]


def points(found: Interval) -> str:
    """Show percent points with their interval."""
    return f"{found.value:.1f} [{found.low:.1f}, {found.high:.1f}]"


if __name__ == "__main__":
    main()
