"""Wrap, train, prune: a smile-detector's worth of privacy on painted handwritten digits.

The task is parity; which digit and which colour it is are private. A timm resnet18 is trained
plainly and wrapped (filters everywhere, one on the uploaded features, trained noise), with the
same budget. The wrapped one is pruned, checked, and all three are attacked and measured.

    python examples/quickstart.py            # some four minutes on two cores
    python examples/quickstart.py --smoke    # seconds, numbers without meaning
"""

import argparse
import statistics
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import timm
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_model
from tqdm import tqdm

import prifu_plugin as prifu
from prifu_plugin.audit.attribute import quick_attack, task_floor
from prifu_plugin.data.digits import load_digits

RATE, BATCH, DOSE = 0.05, 64, 2.6


def rates(epochs, images):
    steps = epochs * (images // BATCH)
    warm = max(1, steps // 10)
    return [RATE * min((i + 1) / warm, 2 * (1 - i / steps), 1.0) for i in range(steps)]


def train(model, data, schedule, name):
    """An ordinary loop: nothing in it knows of filters."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4)
    model.train()
    for step, rate in enumerate(tqdm(schedule, desc=name, disable=None)):
        pick = torch.randint(len(data), (BATCH,), generator=torch.Generator().manual_seed(step))
        optimizer.param_groups[0]["lr"] = rate
        loss = torch.nn.functional.cross_entropy(model(data.images[pick]), data.parity[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def upload(model, images):
    """Return the features before the classifier, and the predicted class."""
    seen = []
    handle = model.get_submodule("fc").register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    predicted = torch.cat([model(part).argmax(1) for part in images.split(500)])
    handle.remove()
    return torch.cat(seen), predicted


def latency_ratios(models, images, rounds):
    """Time the models in turns and return medians relative to the first one."""
    times = [[] for _ in models]
    with torch.no_grad():
        for _ in range(rounds):
            for model, spent in zip(models, times, strict=True):
                start = time.perf_counter()
                model(images)
                spent.append(time.perf_counter() - start)
    medians = [statistics.median(spent[1:]) for spent in times]
    return [median / medians[0] for median in medians]


def main(smoke=False, out="out/quickstart", seed=0):
    torch.manual_seed(seed)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    digits = load_digits(seed)
    task, attack, check, test = (digits.part(*ends) for ends in
                                 ((0, 2600), (2600, 3600), (3600, 4000), (4000, 5000)))
    if smoke:
        task, attack, check, test = (part.part(0, 150) for part in (task, attack, check, test))
    schedule = rates(1 if smoke else 9, len(task))

    net = timm.create_model("resnet18", num_classes=2)
    beta = prifu.dose_to_beta(0.1 if smoke else DOSE, schedule)
    wrapped = prifu.wrap(net, beta=beta, cut="global_pool", noise=0.3,
                         example_inputs=torch.zeros(2, 3, 28, 28))
    plain = train(net, task, schedule, "plain")
    train(wrapped, task, schedule, "wrapped")
    pruned = prifu.prune(wrapped)
    report = prifu.report(pruned)
    print(prifu.summary(wrapped), report, sep="\n\n", end="\n\n")

    models = {"plain": plain, "wrapped": wrapped, "pruned": pruned}
    ratios = latency_ratios(list(models.values()), test.images[:32], 5 if smoke else 30)
    sizes = {"plain": (report.parameters[0], report.macs[0]),
             "wrapped": (sum(p.numel() for p in wrapped.parameters()), report.macs[0]),
             "pruned": (report.parameters[1], report.macs[1])}
    table = Table(title="Even or odd? Private: which digit, which colour (attack on the features)")
    for column in ("", "task", "parameters", "MACs", "file kB", "latency", "digit", "colour"):
        table.add_column(column, justify="right")
    for (name, model), ratio in zip(models.items(), ratios, strict=True):
        parameters, macs = sizes[name]
        save_model(model, str(out / f"{name}.safetensors"))
        z = {part: upload(model, part.images) for part in (attack, check, test)}
        accuracy = (z[test][1] == test.parity).float().mean().item()
        leaks = []
        for kind in ("digit", "colour"):
            pairs = [(z[part][0], getattr(part, kind)) for part in (attack, check, test)]
            result = quick_attack(*pairs, seed=seed)
            floor = task_floor((z[attack][1], getattr(attack, kind)), (z[test][1], getattr(test, kind)))
            leaks.append(f"{result.accuracy:.3f} (floor {max(floor, result.majority):.3f})")
        kilobytes = (out / f"{name}.safetensors").stat().st_size // 1000
        table.add_row(name, f"{accuracy:.3f}", f"{parameters:,}", f"{macs:,}", f"{kilobytes:,}",
                      f"{ratio:.2f}", *leaks)
    Console(width=110).print(table)
    draw(report, out / "channels.png")
    print(f"Test images: {len(test)}, so +-0.03 at 95 %. Picture: {out / 'channels.png'}")


def draw(report, path):
    """Draw how many channels each convolution keeps."""
    layers = [fate for fate in report.layers if fate.type == "Conv2d"]
    figure, axes = plt.subplots(figsize=(9, 3.5), layout="constrained")
    places = range(len(layers))
    axes.bar(places, [fate.channels for fate in layers], color="#d8dee9", label="before")
    axes.bar(places, [fate.channels - fate.removed for fate in layers], color="#2e6f95", label="kept")
    axes.set_xticks(places, [fate.path for fate in layers], rotation=60, ha="right", fontsize=7)
    axes.set(ylabel="channels", title="Channels kept by prune, layer by layer")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", default="out/quickstart")
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
