"""Table 2 and Fig. 9a: what decay and filter do, each alone and together.

python examples/paper/table2.py [--scale cpu|paper] [--smoke] [--cached]
"""

from lab import plans
from lab.datasets import load
from lab.intervals import over_seeds, percent
from lab.pages import published, verdict, write
from lab.runs import complete
from lab.scale import scale_from_command_line
from lab.tables import Line, difference_of_leaks, lines, markdown, notes

PAPER = [
    ["baseline", 92.22, 15.61, 0.6168],
    ["decay", 92.18, 15.44, 0.6082],
    ["filter", 88.53, 12.17, 0.5205],
    ["both", 89.62, 11.33, 0.5078],
]


def main() -> None:
    """Make the four cells and say what holds."""
    scale, cached = scale_from_command_line(__doc__)
    private = load(scale["data"], scale).private
    found = lines(complete(plans.ablation(scale), scale, cached=cached))
    text = [
        "PriFU with alpha 0 is the decay, and closes what falls to 0 or below; with dose 0 it is "
        "the filter alone. Both have the bare norms and the bias of the authors' form.",
        "",
    ]
    text += [*markdown(found, private), ""]
    text += published(["cell", "task", "PSNR", "SSIM"], PAPER, "Table 2, CelebA, ResNet-18")
    text += [*claims(found, private), "", *notes(found)]
    write(scale, __file__, "Table 2: ablation", text)


def claims(found: list[Line], private: tuple[str, ...]) -> list[str]:
    """Return what the paper says of the cells, and what holds."""
    if len(found) < 4:
        return []
    plain, decay, only, both = found
    leaks = {line.label: line.mean_leak(private) for line in found}
    cells = ("plain", "decay alone", "filter alone", "both")
    shown = ", ".join(f"{n} {v:.0f}" for n, v in zip(cells, leaks.values(), strict=True))
    seeds = min(line.seeds for line in found)
    return [
        verdict(
            [difference_of_leaks(both, one, private) for one in (decay, only)],
            "decay and filter together leak less than decay alone, and than the filter alone:",
            f"mean leak in percent: {shown}.",
            seeds,
        ),
        verdict(
            [over_seeds(both.psnrs, less.psnrs) for less in (plain, decay, only)],
            "decay and filter together are hardest to reconstruct from:",
            f"PSNR {plain.psnr:.2f} plain, {decay.psnr:.2f} decay, {only.psnr:.2f} filter, "
            f"{both.psnr:.2f} both; both less each of the others, dB.",
            seeds,
            digits=2,
        ),
        verdict(
            over_seeds(percent(plain.tasks), percent(both.tasks)),
            "the task stays within 3 points:",
            f"{100 * plain.task.value:.1f} to {100 * both.task.value:.1f}.",
            seeds,
            below=3.0,
            shown="Points lost",
            digits=1,
        ),
    ]


if __name__ == "__main__":
    main()
