"""Fig. 3: uploading fewer channels, the most relevant first or any.

python examples/paper/fig3.py [--scale cpu|paper] [--smoke] [--cached]
"""

from lab import plans
from lab.datasets import load
from lab.pages import COLOURS, picture, verdict, write
from lab.runs import complete
from lab.scale import Scale, scale_from_command_line
from lab.tables import Line, lines, markdown

from prifu_plugin.figures import new_figure


def main() -> None:
    """Make both orders of removal and compare them."""
    scale, cached = scale_from_command_line(__doc__)
    private = load(scale["data"], scale).private
    found = lines(complete(plans.removals(scale), scale, cached=cached))
    curves = {
        order: sorted(
            (line for line in found if line.run["settings"].get("order") == order),
            key=lambda line: line.run["settings"]["keep"],
        )
        for order in ("avgri", "random")
    }
    text = [*markdown(found, private), "", drawn(scale, curves, private)]
    pairs = list(zip(curves["avgri"], curves["random"], strict=True))
    if not pairs:
        write(scale, __file__, "Fig. 3: removing channels", ["- Nothing has run yet."])
        return
    seeds = min(line.seeds for pair in pairs for line in pair)
    better = [a.task.value > b.task.value for a, b in pairs]
    shown = "; ".join(
        f"{a.run['settings']['keep']:.0%} kept: {100 * a.task.value:.1f} against "
        f"{100 * b.task.value:.1f}"
        for a, b in pairs
    )
    text += [verdict(all(better), "channels of high AvgRI carry the task:", f"{shown}.", seeds)]
    lower = [a.mean_leak(private) < b.mean_leak(private) for a, b in pairs]
    shown = "; ".join(
        f"{a.mean_leak(private):.0f} against {b.mean_leak(private):.0f}" for a, b in pairs
    )
    claim = "channels of high AvgRI leak less than random ones:"
    text += [verdict(all(lower), claim, f"mean leak {shown}.", seeds)]
    write(scale, __file__, "Fig. 3: removing channels", text)


def drawn(scale: Scale, curves: dict[str, list[Line]], private: tuple[str, ...]) -> str:
    """Draw the task and the attacks over the share of channels that is kept."""
    axes = new_figure(6, 4).subplots()
    for order, style in (("avgri", "-o"), ("random", "--s")):
        kept = [100 * line.run["settings"]["keep"] for line in curves[order]]
        axes.plot(
            kept,
            [100 * line.task.value for line in curves[order]],
            "k" + style,
            label=f"task, {order}",
        )
        for place, name in enumerate(private):
            values = [100 * line.cells[name].accuracy.value for line in curves[order]]
            axes.plot(kept, values, style, color=COLOURS[place], label=f"{name}, {order}", lw=1)
    axes.set(xlabel="channels kept, %", ylabel="accuracy, %")
    axes.legend(fontsize=7)
    return picture(scale, axes.figure, "fig3", "Accuracy over channels kept")


if __name__ == "__main__":
    main()
