"""Table 3 and Fig. 9: other backbones, wide, deep and dense.

python examples/paper/table3.py [--scale cpu|paper] [--smoke] [--cached]
"""

from lab import plans
from lab.datasets import load
from lab.intervals import over_seeds, percent
from lab.pages import COLOURS, picture, published, verdict, write
from lab.runs import complete
from lab.scale import scale_from_command_line
from lab.tables import Line, difference_of_leaks, lines, markdown, notes

from prifu_plugin.figures import new_figure

PAPER = [
    ["ResNet18", "92.22 / 89.62", "15.61 / 11.33", "0.6168 / 0.5078"],
    ["ResNet152", "91.93 / 88.79", "15.49 / 11.44", "0.6152 / 0.5090"],
    ["VGG16", "92.18 / 87.45", "18.03 / 11.38", "0.6889 / 0.5100"],
    ["DenseNet121", "92.06 / 88.67", "16.88 / 11.32", "0.6467 / 0.5080"],
]


def main() -> None:
    """Make plain and filtered runs of every backbone and say what holds."""
    scale, cached = scale_from_command_line(__doc__)
    private = load(scale["data"], scale).private
    found = lines(complete(plans.backbones(scale), scale, cached=cached))
    text: list[str] = []
    for line in found:
        line.__dict__["label"] = f"{line.run['network']}, {line.run['method']}"
    text += [*markdown(found, private), ""]
    text += [bubbles(scale, found, private)]
    text += published(["backbone", "task, plain / ours", "PSNR", "SSIM"], PAPER, "Table 3, CelebA")
    pairs = [
        (a, b)
        for a, b in zip(found, found[1:], strict=False)
        if a.run["network"] == b.run["network"]
    ]
    for plain, ours in pairs:
        seeds = min(plain.seeds, ours.seeds)
        leaks = difference_of_leaks(ours, plain, private)
        drop = over_seeds(percent(plain.tasks), percent(ours.tasks))
        text += [
            verdict(
                drop,
                f"{ours.run['network']} keeps the task within 5 points:",
                "",
                seeds,
                below=5.0,
                shown="Points lost",
                digits=1,
            ),
            verdict(
                over_seeds(ours.psnrs, plain.psnrs),
                f"{ours.run['network']} is harder to reconstruct from with filters:",
                f"PSNR {plain.psnr:.2f} to {ours.psnr:.2f}.",
                seeds,
                digits=2,
            ),
            verdict(
                leaks, f"{ours.run['network']} leaks less with filters, of 100 %:", "", seeds
            ),
        ]
    write(scale, __file__, "Table 3: backbones", [*text, "", *notes(found)])


def bubbles(scale, found: list[Line], private: tuple[str, ...]) -> str:
    """Draw what attackers read of two attributes, with floors; the larger, the better the task."""
    axes = new_figure(5, 4).subplots()
    for place, line in enumerate(found):
        x, y = (100 * line.cells[name].accuracy.value for name in private[:2])
        axes.scatter(
            [x],
            [y],
            s=4000 * max(line.task.value - 0.5, 0.01) ** 2,
            alpha=0.6,
            color=COLOURS[place // 2],
            hatch="//" if place % 2 else None,
            label=f"{line.label}, task {100 * line.task.value:.0f}",
        )
    for draw, name in zip((axes.axvline, axes.axhline), private, strict=False):
        floor = max(line.cells[name].floor for line in found)
        draw(100 * floor, color="#999999", lw=0.7, ls=":")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1), markerscale=0.3)
    axes.set(xlabel=f"attack on {private[0]}, %", ylabel=f"attack on {private[1]}, %")
    return picture(scale, axes.figure, "fig9", "Attack accuracy by backbone")


if __name__ == "__main__":
    main()
