"""Fig. 6: do the weights follow the relevance, and does decay make them?

python examples/paper/fig6.py [--scale cpu|paper] [--smoke]
"""

import statistics

from lab.datasets import Study, load
from lab.intervals import over_seeds
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
        ranks, spreads = {}, {}
        for seed, one in zip(scale["seeds"], found, strict=True):
            ranks[seed] = statistics.mean(layer.correlation for layer in one.layers.values())
            weights = [layer.weight for layer in one.layers.values()]
            spreads[seed] = statistics.mean(float(w.std() / w.mean().abs()) for w in weights)
        rows[dose] = ranks, spreads
    text = ["| dose | rank correlation of W and AvgRI, mean over layers, by seed | spread of W |"]
    text += ["|---|---|---|"]
    for dose, (ranks, spreads) in rows.items():
        text += [f"| {dose} | {by_seed(ranks)} | {by_seed(spreads)} |"]
    text += ["", drawn(scale, layers)]
    text += claims(*rows.values())
    write(scale, __file__, "Fig. 6: W and AvgRI", text)


BySeed = dict[int, float]


def claims(without: tuple[BySeed, BySeed], decayed: tuple[BySeed, BySeed]) -> list[str]:
    """Return what the paper says of W and AvgRI, and what holds."""
    (ranks, spreads), (later, wider) = without, decayed
    seeds = len(ranks)
    times = {seed: wider[seed] / spreads[seed] for seed in spreads}
    return [
        verdict(
            [over_seeds(ranks), over_seeds(later)],
            "W and AvgRI go together, with a rank correlation above 0.5:",
            f"by seed {by_seed(ranks)} without decay, {by_seed(later)} with it.",
            seeds,
            above=0.5,
            shown="Means",
            digits=2,
        ),
        verdict(
            over_seeds(later, ranks),
            "decay makes W and AvgRI agree more:",
            "",
            seeds,
            above=0.0,
            digits=2,
        ),
        verdict(
            over_seeds(times),
            "decay spreads the weights, at least twice as wide:",
            f"coefficient of variation {by_seed(spreads)} to {by_seed(wider)}.",
            seeds,
            above=2.0,
            shown="Ratio",
            digits=1,
        ),
    ]


def by_seed(values: BySeed) -> str:
    """Show what was measured with each seed."""
    return "/".join(f"{v:.2f}" for v in values.values())


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
