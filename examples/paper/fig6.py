"""Fig. 6: do the weights follow the relevance, and does decay make them?

python examples/paper/fig6.py [--scale cpu|paper] [--smoke]
"""

import statistics
from typing import NamedTuple

from lab.datasets import Study, load
from lab.intervals import over_seeds
from lab.methods import deploy
from lab.pages import picture, verdict, write
from lab.runs import run_of
from lab.scale import Scale, scale_from_command_line

import prifu_plugin as prifu
from prifu_plugin import pictures
from prifu_plugin.figures import new_figure
from prifu_plugin.ranks import spearman


def main() -> None:
    """Train with and without decay, without threshold, and correlate W with AvgRI by layer."""
    scale, _ = scale_from_command_line(__doc__)
    study = load(scale["data"], scale)
    rows, layers = {}, []
    for dose in (0.0, scale["filter"]["dose"]):
        found = [measured(scale, study, dose, seed) for seed in scale["seeds"]]
        layers += [found[0].layers]
        rows[dose] = Measured(
            *(
                {seed: of(one) for seed, one in zip(scale["seeds"], found, strict=True)}
                for of in (ranks, ranks_of_open, ranks_behind, spread)
            )
        )
    text = [
        "AvgRI of a channel is W times the influence behind the filter (Eq. 8), so the two go "
        "together in part by construction, and the more the wider W spreads; closed channels are "
        "tied at 0 in both. Hence the other two columns: open channels alone, and W against the "
        "influence behind the filter. Rank correlations are means over layers, by seed.",
        "",
        "| dose | W and AvgRI | open channels alone | W and the influence behind | spread of W |",
        "|---|---|---|---|---|",
    ]
    for dose, measured_by in rows.items():
        text += [f"| {dose} | " + " | ".join(map(by_seed, measured_by)) + " |"]
    text += ["", drawn(scale, layers)]
    text += claims(*rows.values())
    write(scale, __file__, "Fig. 6: W and AvgRI", text)


BySeed = dict[int, float]


class Measured(NamedTuple):
    """What is measured of networks, by seed: columns of the table."""

    ranks: BySeed
    of_open: BySeed
    behind: BySeed
    spread: BySeed


def ranks(found: prifu.Relevance) -> float:
    """Return the rank correlation of W and AvgRI, mean over layers."""
    return statistics.mean(layer.correlation for layer in found.layers.values())


def ranks_of_open(found: prifu.Relevance) -> float:
    """Return the same over the channels that are open."""
    layers = [(layer, layer.weight > 0) for layer in found.layers.values()]
    return statistics.mean(spearman(one.weight[o], one.avgri[o]) for one, o in layers)


def ranks_behind(found: prifu.Relevance) -> float:
    """Return the rank correlation of W and the influence behind the filter, of open channels."""
    layers = [(layer, layer.weight > 0) for layer in found.layers.values()]
    return statistics.mean(spearman(one.weight[o], one.after[o]) for one, o in layers)


def spread(found: prifu.Relevance) -> float:
    """Return the coefficient of variation of W, mean over layers."""
    weights = [layer.weight for layer in found.layers.values()]
    return statistics.mean(float(w.std() / w.mean().abs()) for w in weights)


def claims(without: Measured, decayed: Measured) -> list[str]:
    """Return what the paper says of W and AvgRI, and what holds."""
    ranks, later, spreads, wider = without.ranks, decayed.ranks, without.spread, decayed.spread
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
            over_seeds(decayed.of_open, without.of_open),
            "decay makes them agree more among open channels:",
            "",
            seeds,
            above=0.0,
            digits=2,
        ),
        verdict(
            [over_seeds(without.behind), over_seeds(decayed.behind)],
            "W goes with the influence behind the filter as well, so not by construction alone:",
            "",
            seeds,
            above=0.0,
            shown="Means",
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
    alt = "W over channels in the order of AvgRI, a late layer of the first seed"
    return picture(scale, grid[0].figure, "fig6", alt)


if __name__ == "__main__":
    main()
