"""Fig. 7: three input channels more that carry noise; does AvgRI tell them from the picture?

python examples/paper/fig7.py [--scale cpu|paper] [--smoke]
"""

import torch
from lab.datasets import Study, load
from lab.intervals import over_seeds
from lab.networks import build
from lab.pages import picture, verdict, write
from lab.scale import Scale, scale_from_command_line
from torch import Tensor, nn

import prifu_plugin as prifu
from prifu_plugin import baselines, pictures
from prifu_plugin.audit.data import uploads

DEVIATION = 0.2
CHANNELS = ("red", "green", "blue", "constant", "uniform", "Gaussian")


def main() -> None:
    """Train on six channels and on three, and compare relevance and accuracy."""
    scale, _ = scale_from_command_line(__doc__)
    study = load(scale["data"], scale)
    text = [
        f"A plain network; noise is drawn anew in every pass. The Gaussian has a deviation of "
        f"{DEVIATION}: with the paper's, 1, they are at chance after as many epochs.",
        "",
        "| seed | " + " | ".join(CHANNELS) + " | task, 6 channels | task, 3 |",
        "|" + "---|" * (len(CHANNELS) + 3),
    ]
    ratios, drops, first, worst = {}, {}, None, 1.0
    for seed in scale["seeds"]:
        found, six = trained(scale, study, seed, noisy=True)
        _, three = trained(scale, study, seed, noisy=False)
        first = first or found
        shown = " | ".join(f"{1e3 * float(v):.2f}e-3" for v in found.inputs)
        text += [f"| {seed} | {shown} | {100 * six:.1f} | {100 * three:.1f} |"]
        worst = min(worst, six, three)
        ratios[seed] = float(found.inputs[:3].min() / found.inputs[3:].max())
        drops[seed] = 100 * (three - six)
    figure, _ = pictures.plot_inputs(first, CHANNELS)
    text += ["", picture(scale, figure, "fig7", "AvgRI of the input channels, the first seed")]
    guess = float(study.test.labels[study.task].bincount().max()) / len(study.test)
    if worst < guess + 0.1:
        text += ["A network did not learn the task: nothing here is evidence.", ""]
    text += claims(ratios, drops)
    write(scale, __file__, "Fig. 7: input channels", text)


def claims(ratios: dict[int, float], drops: dict[int, float]) -> list[str]:
    """Return what the paper says of the channels, and what holds."""
    by_seed = ", ".join(f"{r:.2f}" for r in ratios.values())
    least = f"least colour over largest noise, by seed: {by_seed}."
    lost = ", ".join(f"{d:.1f}" for d in drops.values())
    seeds, ratio = len(ratios), over_seeds(ratios)
    return [
        verdict(
            ratio,
            "every colour is more relevant than every noise:",
            least,
            seeds,
            above=1.0,
            shown="Mean",
            digits=2,
        ),
        verdict(
            ratio,
            "every colour is at least five times as relevant, as in the paper's figure:",
            f"{by_seed}.",
            seeds,
            above=5.0,
            shown="Mean",
            digits=2,
        ),
        verdict(
            over_seeds(drops),
            "noise channels cost less than three points:",
            f"points lost, by seed: {lost}.",
            seeds,
            below=3.0,
            shown="Mean",
            digits=1,
        ),
    ]


def trained(scale: Scale, study: Study, seed: int, *, noisy: bool) -> tuple[prifu.Relevance, float]:
    """Return the relevance of the inputs of a plain network, and its accuracy."""
    labels = study.defence.labels[study.task]
    net = build(scale["network"], study.classes, seed, channels=6 if noisy else 3)
    whole = Widened(net) if noisy else net
    images = study.defence.images
    baselines.fit(
        baselines.TaskOnly(whole.to(scale.device), nn.Identity()),
        images,
        labels,
        schedule=scale.schedule,
        seed=seed,
    )
    right = uploads(whole, study.test.images, "answers").argmax(1) == study.test.labels[study.task]
    total = torch.zeros((), dtype=torch.float64)
    for x, y in zip(images.split(200), labels.split(200), strict=True):
        maps = prifu.influence(net, widened(x) if noisy else x, y)
        total = total + maps.double().sum((0, 2, 3)).cpu()
    averages = total / (len(images) * images[0, 0].numel())
    return prifu.Relevance({}, averages, len(images)), float(right.double().mean())


class Widened(nn.Module):
    """A network of six channels on images of three: every pass draws noise anew."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Return what the network says of images with three channels more."""
        return self.net(widened(x))


def widened(images: Tensor) -> Tensor:
    """Add a channel of ones, one of uniform and one of Gaussian noise."""
    like = images[:, :1]
    normal = 0.5 + DEVIATION * torch.randn_like(like)
    return torch.cat([images, torch.ones_like(like), torch.rand_like(like), normal], 1)


if __name__ == "__main__":
    main()
