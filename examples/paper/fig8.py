"""Fig. 8: what alpha and beta do to the task, to attacks and to the number of open channels.

python examples/paper/fig8.py [--scale cpu|paper] [--smoke] [--cached]
"""

import statistics
from itertools import pairwise

from lab import plans
from lab.datasets import load
from lab.intervals import over_seeds, percent
from lab.pages import COLOURS, picture, verdict, write
from lab.runs import Run, complete
from lab.scale import Scale, scale_from_command_line
from lab.tables import Line, difference_of_accuracies, lines, markdown, notes

from prifu_plugin.figures import new_figure


def main() -> None:
    """Make both sweeps and draw them."""
    scale, cached = scale_from_command_line(__doc__)
    private = load(scale["data"], scale).private
    text, panels = [], []
    for name, runs in (("alpha", plans.alphas(scale)), ("dose", plans.doses(scale))):
        results = complete(runs, scale, cached=cached)
        opened: dict[float, dict[int, float]] = {}
        for result in results:
            value, (some, every) = _value(result["run"], name, scale), result["open"]
            opened.setdefault(value, {})[result["run"]["seed"]] = 100 * some / every
        shares = [opened[value] for value in sorted(opened)]
        found = sorted(lines(results), key=lambda line: _value(line.run, name, scale))
        panels.append((name, found, [statistics.mean(share.values()) for share in shares]))
        text += [f"## Over {name}", "", *markdown(found, private), ""]
        text += [*claims(name, sorted(opened), shares, found, private[0]), "", *notes(found), ""]
    text += [drawn(scale, panels, private)]
    write(scale, __file__, "Fig. 8: alpha and beta", text)


def claims(
    name: str,
    values: list[float],
    shares: list[dict[int, float]],
    found: list[Line],
    attribute: str,
) -> list[str]:
    """Return what the paper says of a setting, and what holds."""
    if len(found) < 2:
        return []
    seeds = min(line.seeds for line in found)
    means = [statistics.mean(share.values()) for share in shares]
    opened = [f"{value}: {mean:.0f} %" for value, mean in zip(values, means, strict=True)]
    read = ", ".join(f"{100 * line.cells[attribute].accuracy.value:.1f}" for line in found)
    cells = [line.cells[attribute] for line in found]
    return [
        verdict(
            [over_seeds(more, less) for less, more in pairwise(shares)],
            f"every step to more {name} closes channels:",
            f"open channels, {', '.join(opened)}.",
            seeds,
            shown="Steps",
            digits=1,
        ),
        verdict(
            difference_of_accuracies(cells[-1], cells[0]),
            f"with the most {name}, attackers read less of {attribute}, by more than 3 points:",
            f"{read}.",
            seeds,
            below=-3.0,
            digits=1,
        ),
        verdict(
            [difference_of_accuracies(more, less) for less, more in pairwise(cells)],
            f"every step to more {name} leaves attackers less of {attribute}:",
            "",
            seeds,
            shown="Steps",
            digits=1,
        ),
        verdict(
            over_seeds(percent(found[0].tasks), percent(found[-1].tasks)),
            f"the most {name} costs the task less than 3 points:",
            "",
            seeds,
            below=3.0,
            shown="Points lost",
            digits=1,
        ),
    ]


def drawn(scale: Scale, panels: list, private: tuple[str, ...]) -> str:
    """Draw accuracies and open channels over both settings."""
    grid = new_figure(10, 3.6).subplots(1, 2)
    for axes, (name, found, opened) in zip(grid, panels, strict=True):
        x = [_value(line.run, name, scale) for line in found]
        axes.plot(x, [100 * line.task.value for line in found], "k-o", label="task")
        for place, attribute in enumerate(private):
            cells = [line.cells[attribute] for line in found]
            y = [100 * cell.accuracy.value for cell in cells]
            axes.plot(x, y, "-o", color=COLOURS[place], label=attribute)
            floor = [100 * cell.floor for cell in cells]
            label = "floors" if place == 0 else None
            axes.plot(x, floor, "--", color=COLOURS[place], lw=0.8, label=label)
        axes.plot(x, opened, ":", color="#777777", label="open channels")
        axes.set(xlabel=name, ylabel="%", ylim=(0, 104))
    grid[1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1))
    return picture(scale, grid[0].figure, "fig8", "Task and attacks over alpha and dose")


def _value(run: Run, name: str, scale: Scale) -> float:
    return run["settings"].get(name, scale["filter"][name])


if __name__ == "__main__":
    main()
