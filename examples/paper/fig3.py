"""Fig. 3: uploading fewer channels, the most relevant first or any.

python examples/paper/fig3.py [--scale cpu|paper] [--smoke] [--cached]
"""

from lab import plans
from lab.datasets import load
from lab.intervals import over_seeds, percent
from lab.pages import COLOURS, picture, verdict, write
from lab.runs import complete
from lab.scale import Scale, scale_from_command_line
from lab.tables import Line, difference_of_leaks, lines, markdown, notes

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
    text += [
        "One random draw of channels a seed; the attackers learn anew for each.",
        "",
        *claims(pairs, private),
        "",
        *notes(found),
    ]
    write(scale, __file__, "Fig. 3: removing channels", text)


def claims(pairs: list[tuple[Line, Line]], private: tuple[str, ...]) -> list[str]:
    """Return what the paper says of the order of removal, and what holds."""
    seeds = min(line.seeds for pair in pairs for line in pair)
    kept = [f"{a.run['settings']['keep']:.0%} kept:" for a, _ in pairs]
    tasks = [
        f"{share} {100 * a.task.value:.1f} against {100 * b.task.value:.1f}"
        for share, (a, b) in zip(kept, pairs, strict=True)
    ]
    leaks = [
        f"{share} {a.mean_leak(private):.0f} against {b.mean_leak(private):.0f}"
        for share, (a, b) in zip(kept, pairs, strict=True)
    ]
    return [
        verdict(
            [over_seeds(percent(a.tasks), percent(b.tasks)) for a, b in pairs],
            "channels of high AvgRI carry the task better than random ones:",
            "; ".join(tasks) + ".",
            seeds,
            above=0.0,
            digits=1,
        ),
        verdict(
            [difference_of_leaks(a, b, private) for a, b in pairs],
            "channels of high AvgRI leak less than random ones:",
            "mean leak, " + "; ".join(leaks) + ".",
            seeds,
        ),
    ]


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
    for place, name in enumerate(private):
        floors = [100 * line.cells[name].floor for line in curves["avgri"]]
        label = "floors" if place == 0 else None
        axes.plot(kept, floors, ":", color=COLOURS[place], lw=0.8, label=label)
    axes.set(xlabel="channels kept, %", ylabel="accuracy, %", ylim=(0, 104))
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1))
    return picture(scale, axes.figure, "fig3", "Accuracy over channels kept")


if __name__ == "__main__":
    main()
