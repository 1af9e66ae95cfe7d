"""Fig. 8: what alpha and beta do to the task, to attacks and to the number of open channels.

python examples/paper/fig8.py [--scale cpu|paper] [--smoke] [--cached]
"""

import statistics

from lab import plans
from lab.datasets import load
from lab.pages import COLOURS, picture, verdict, write
from lab.runs import complete
from lab.scale import Scale, scale_from_command_line
from lab.tables import Line, lines, markdown

from prifu_plugin.figures import new_figure


def main() -> None:
    """Make both sweeps and draw them."""
    scale, cached = scale_from_command_line(__doc__)
    private = load(scale["data"], scale).private
    text, panels = [], []
    for name, runs in (("alpha", plans.alphas(scale)), ("dose", plans.doses(scale))):
        results = complete(runs, scale, cached=cached)
        opened: dict[float, list[float]] = {}
        for result in results:
            value = result["run"]["settings"].get(name, scale["filter"][name])
            opened.setdefault(value, []).append(result["open"][0] / result["open"][1])
        found = sorted(lines(results), key=lambda line: _value(line, name, scale))
        panels.append((name, found, [statistics.mean(opened[v]) for v in sorted(opened)]))
        text += [f"## Over {name}", "", *markdown(found, private), ""]
        shares = ", ".join(f"{v}: {100 * statistics.mean(opened[v]):.0f} %" for v in sorted(opened))
        text += [f"Open channels: {shares}.", ""]
        falling = [statistics.mean(opened[v]) for v in sorted(opened)]
        read = [line.cells[private[0]].accuracy.value for line in found]
        seeds = min((line.seeds for line in found), default=0)
        text += [
            verdict(
                len(falling) > 1 and falling == sorted(set(falling), reverse=True),
                f"more {name} closes more channels:",
                ", ".join(f"{100 * share:.0f} %" for share in falling) + " open.",
                seeds,
            ),
            verdict(
                _falls(read),
                f"with more {name}, attackers read less of {private[0]}, by more than 3 points:",
                ", ".join(f"{100 * value:.1f}" for value in read) + ".",
                seeds,
            ),
            "",
        ]
    text += [drawn(scale, panels, private)]
    write(scale, __file__, "Fig. 8: alpha and beta", text)


def drawn(scale: Scale, panels: list, private: tuple[str, ...]) -> str:
    """Draw accuracies and open channels over both settings."""
    grid = new_figure(10, 3.6).subplots(1, 2)
    for axes, (name, found, opened) in zip(grid, panels, strict=True):
        x = [_value(line, name, scale) for line in found]
        axes.plot(x, [100 * line.task.value for line in found], "k-o", label="task")
        for place, attribute in enumerate(private):
            y = [100 * line.cells[attribute].accuracy.value for line in found]
            axes.plot(x, y, "-o", color=COLOURS[place], label=attribute)
        axes.plot(x, [100 * share for share in opened], ":", color="#777777", label="open channels")
        axes.set(xlabel=name, ylabel="%")
    grid[0].legend(fontsize=7)
    return picture(scale, grid[0].figure, "fig8", "Task and attacks over alpha and dose")


def _value(line: Line, name: str, scale: Scale) -> float:
    return line.run["settings"].get(name, scale["filter"][name])


def _falls(values: list[float]) -> bool:
    """Whether no step rises by more than a point and the whole falls by more than three."""
    steps = zip(values, values[1:], strict=False)
    return (
        len(values) > 1 and all(b <= a + 0.01 for a, b in steps) and values[-1] < values[0] - 0.03
    )


if __name__ == "__main__":
    main()
