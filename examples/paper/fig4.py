"""Fig. 4: which pixels the loss listens to, without and with filters.

python examples/paper/fig4.py [--scale cpu|paper] [--smoke]
"""

import torch
from lab.datasets import load
from lab.intervals import over_seeds
from lab.methods import deploy
from lab.pages import picture, verdict, write
from lab.runs import run_of
from lab.scale import scale_from_command_line
from torch import Tensor

import prifu_plugin as prifu
from prifu_plugin import pictures


def main() -> None:
    """Draw Relative Influence maps (Eq. 1) and measure how concentrated they are."""
    scale, _ = scale_from_command_line(__doc__)
    study = load(scale["data"], scale)
    images, target = study.test.images[:200], study.test.labels[study.task][:200]
    text: list[str] = []
    shares: dict[str, dict[int, float]] = {"plain": {}, "PriFU": {}}
    for method, found in shares.items():
        for seed in scale["seeds"]:
            model = deploy(run_of(scale, method, seed), study, scale).model.eval()
            maps = prifu.influence(model, images, target)
            found[seed] = float(gini(maps.sum(1).flatten(1)).mean())
            if seed == scale["seeds"][0]:
                figure, _ = pictures.plot_influence(images[:8], maps[:8])
                text += [picture(scale, figure, f"fig4-{method}", f"Influence of pixels, {method}")]
    shown = ", ".join(
        f"{name} {'/'.join(f'{value:.3f}' for value in found.values())}"
        for name, found in shares.items()
    )
    text += [
        verdict(
            over_seeds(shares["PriFU"], shares["plain"]),
            "filters concentrate the influence on fewer pixels:",
            f"mean Gini coefficient by seed {shown}.",
            len(scale["seeds"]),
            above=0.0,
            digits=3,
        )
    ]
    write(scale, __file__, "Fig. 4: Relative Influence", text)


def gini(values: Tensor) -> Tensor:
    """Return the Gini coefficient of each row: 0 if all values are equal, near 1 if one has all."""
    ordered = values.double().sort(1).values
    count = ordered.shape[1]
    places = torch.arange(1, count + 1)
    weighted = (ordered * (2 * places - count - 1)).sum(1)
    return weighted / (count * ordered.sum(1).clamp_min(1e-300))


if __name__ == "__main__":
    main()
