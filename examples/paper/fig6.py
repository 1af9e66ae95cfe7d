"""Fig. 6: do the weights follow the relevance, and does decay make them?

python examples/paper/fig6.py [--scale cpu|paper] [--smoke]
"""

import statistics

from lab.datasets import Study, load
from lab.methods import deploy
from lab.pages import picture, verdict, write
from lab.runs import run_of
from lab.scale import Scale, scale_from_command_line

import prifu_plugin as prifu
from prifu_plugin import pictures
from prifu_plugin.figures import new_figure


def main() -> None:
    """Train with and without decay, without threshold, and correlate W with AvgRI by layer."""
    scale, _ = scale_from_command_line(__doc__)
    study = load(scale["data"], scale)
    rows, layers = {}, []
    for dose in (0.0, scale["filter"]["dose"]):
        found = [measured(scale, study, dose, seed) for seed in scale["seeds"]]
        layers += [found[0].layers]
        ranks, spreads = [], []
        for one in found:
            ranks.append(statistics.mean(layer.correlation for layer in one.layers.values()))
            weights = [layer.weight for layer in one.layers.values()]
            spreads.append(statistics.mean(float(w.std() / w.mean().abs()) for w in weights))
        rows[dose] = ranks, spreads
    text = ["| dose | rank correlation of W and AvgRI, mean over layers, by seed | spread of W |"]
    text += ["|---|---|---|"]
    for dose, (ranks, spreads) in rows.items():
        shown = ["/".join(f"{v:.2f}" for v in values) for values in (ranks, spreads)]
        text += [f"| {dose} | {shown[0]} | {shown[1]} |"]
    text += ["", drawn(scale, layers)]
    (none, loose), (decayed, wide) = rows.values()
    means = [statistics.mean(v) for v in (none, decayed, loose, wide)]
    shown = ["/".join(f"{v:.2f}" for v in values) for values in (none, decayed, loose, wide)]
    text += [
        verdict(
            min(none + decayed) > 0.5,
            "W and AvgRI go together:",
            f"rank correlation by seed {shown[0]} without decay, {shown[1]} with it.",
            len(none),
        ),
        verdict(
            means[1] > means[0] + statistics.pstdev(none),
            "decay makes W and AvgRI agree more, by more than the spread over seeds.",
            "",
            len(none),
        ),
        verdict(
            means[3] > 2 * means[2],
            "decay spreads the weights:",
            f"coefficient of variation {shown[2]} to {shown[3]}.",
            len(none),
        ),
    ]
    write(scale, __file__, "Fig. 6: W and AvgRI", text)


def measured(scale: Scale, study: Study, dose: float, seed: int) -> prifu.Relevance:
    """Train one network and measure its relevance on the images it was trained on."""
    run = run_of(scale, "PriFU", seed, alpha=0.0, dose=dose)
    model = deploy(run, study, scale).model.eval()
    data = study.defence.images.split(200), study.defence.labels[study.task].split(200)
    return prifu.relevance(model, zip(*data, strict=True))


def drawn(scale: Scale, layers: list) -> str:
    """Draw W over channels by AvgRI, a late layer, without and with decay."""
    grid = new_figure(8, 5).subplots(2, 1)
    for axes, found, title in zip(grid, layers, ("without decay", "with decay"), strict=True):
        pictures.plot_ranks(list(found.values())[-2], axes)
        axes.set_title(f"{axes.get_title()}, {title}", fontsize=9)
    return picture(scale, grid[0].figure, "fig6", "W over channels in the order of AvgRI")


if __name__ == "__main__":
    main()
