"""Fig. 11: what decoders make of uploads.

python examples/paper/fig11.py [--scale cpu|paper] [--smoke]
"""

import torch
from lab.datasets import load
from lab.methods import deploy
from lab.pages import picture, write
from lab.runs import run_of
from lab.scale import scale_from_command_line

from prifu_plugin.audit.data import uploads
from prifu_plugin.audit.reconstruction import reconstruct
from prifu_plugin.figures import new_figure

METHODS = {
    cut: [
        ("plain", {}),
        ("PriFU", {}),
        ("PriFU", {"cut_filter": True, **form}),
        ("RAN", {"strength": 1.0}),
        ("NoPeek-Infer", {"strength": 1.0}),
        ("VIB", {"strength": nats}),
    ]
    for cut, form, nats in (
        ("pooled", {"noise": 0.3}, 0.003),
        ("early", {"rotated": True, "noise": 0.3, "ramped": True}, 0.0001),
    )
}
"""What the comparison found to protect best at each cut, beside rivals that name no label."""


def main() -> None:
    """Reconstruct eight test images from each method's uploads."""
    scale, _ = scale_from_command_line(__doc__)
    study = load(scale["data"], scale)
    text = []
    for cut in scale["cuts"]:
        rows = {}
        for method, settings in METHODS[cut]:
            run = run_of(scale, method, scale["seeds"][0], cut=cut, **settings)
            deployed = deploy(run, study, scale)
            sent = [
                uploads(deployed.edge, part.images, method) for part in (study.attack, study.test)
            ]
            answers = [uploads(deployed.cloud, z, "answers").argmax(1) for z in sent]
            name = ", ".join([method, *(f"{k} {v}" for k, v in settings.items())])
            some = len(sent[0]) * 3 // 4  # the rest is to choose among decoders
            found = reconstruct(
                (sent[0][:some], study.attack.images[:some]),
                (sent[0][some:], study.attack.images[some:]),
                (sent[1], study.test.images),
                (answers[0][:some], answers[1]),
                steps=10 if scale.name == "smoke" else 250,
                losses=["squared error"],
                device=scale.device,
            )
            rows[f"{name}: {found.best.psnr:.1f} dB"] = found.images
        rows = {"the images": torch.stack([found.images[0]] * 2), **rows}
        text += [f"## The {cut} cut", "", gallery(scale, rows, cut)]
    text += [
        f"The mean image alone has {found.mean_image.psnr:.1f} dB, the mean image of the "
        f"task's answer {found.task_mean.psnr:.1f} dB.",
        "",
        "One seed, one upload of each image, and a decoder for squared error alone: PSNRs are not "
        "those of the tables, which take the best of several. What each method leaves of the task "
        "is in the comparison's tables.",
        "",
    ]
    write(scale, __file__, "Fig. 11: reconstructions", text)


def gallery(scale, rows: dict, cut: str) -> str:
    """Draw a row of images for each method."""
    grid = new_figure(8, 1.15 * len(rows)).subplots(len(rows), 8)
    for line, (name, images) in zip(grid, rows.items(), strict=True):
        for axes, image in zip(line, images[1], strict=True):
            axes.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy())
            axes.axis("off")
        line[0].set_title(name, fontsize=8, loc="left")
    return picture(scale, grid[0, 0].figure, f"fig11-{cut}", "Reconstructed images")


if __name__ == "__main__":
    main()
