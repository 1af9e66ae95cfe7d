"""Wrap, train, prune: what do a parity detector's features tell about the digit and its colour?

A timm resnet18 learns even or odd on painted handwritten digits, plainly and wrapped (filters
everywhere, one on the uploaded features, trained noise), is pruned, and all uploads are attacked.
    python examples/quickstart.py    # two to four minutes on two cores; with --smoke, seconds
"""

import argparse
import statistics
import time
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_model
from tqdm import tqdm

import prifu_plugin as prifu
from prifu_plugin.channel import Channel, Projection
from prifu_plugin.data.digits import load_digits

RATE, BATCH, EPOCHS, DOSE = 0.05, 64, 10, 2.6
PRIVATE = "digit", "colour"


def load(seed, smoke):
    """Return images and labels of the defender, the attacker and the test; they share none."""
    digits = load_digits(seed)
    for start, end in ((0, 2600), (2600, 4000), (4000, 5000)):
        part = digits.part(start, start + 200 if smoke else end)
        yield prifu.AuditData(part.images, {k: getattr(part, k) for k in ("parity", *PRIVATE)})


def train(model, data, schedule, name):
    """Train with an ordinary loop: nothing in it knows of filters."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4)
    model.train()
    for step, rate in enumerate(tqdm(schedule, desc=name, disable=None)):
        pick = torch.randint(len(data), (BATCH,), generator=torch.Generator().manual_seed(step))
        images, parity = data.images[pick], data.labels["parity"][pick]
        optimizer.param_groups[0]["lr"] = rate
        loss = torch.nn.functional.cross_entropy(model(images), parity)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def latency_ratios(models, images, rounds):
    """Time the models in turns and return medians relative to the first one."""
    times = [[] for _ in models]
    for _ in range(rounds):
        for model, spent in zip(models, times, strict=True):
            start = time.perf_counter()
            model(images)
            spent.append(time.perf_counter() - start)
    return [statistics.median(spent[1:]) / statistics.median(times[0][1:]) for spent in times]


def audits(models, images, attack):
    """Cut each model behind its features and attack what is uploaded there; yield reports."""
    sent = {name: (*prifu.split(m, "global_pool", images), None) for name, m in models.items()}
    # A control that costs nothing: of the plain features, what the server's linear head can see.
    seen = Projection(models["plain"].fc)
    sent["plain, projection"] = sent["plain"][0], seen.server().eval(), Channel(seen).eval()
    known = {}
    for name, (edge, cloud, channel) in sent.items():
        found = prifu.audit(
            edge, *attack, task="parity", attributes=PRIVATE, cloud=cloud, channel=channel,
            references=known, suite="quick", seeds=1, reconstruct=False, name=name,
        )  # fmt: skip
        known = known or {"plain": found}
        yield found


def main(smoke=False, out="out/quickstart", seed=0):
    """Run everything and print one table."""
    torch.manual_seed(seed)
    (out := Path(out)).mkdir(parents=True, exist_ok=True)
    task, *attack = load(seed, smoke)
    steps = (1 if smoke else EPOCHS) * (len(task) // BATCH)
    warm = max(1, steps // 10)
    schedule = [RATE * min((i + 1) / warm, 2 * (1 - i / steps), 1.0) for i in range(steps)]

    net = timm.create_model("resnet18", num_classes=2)
    beta = prifu.dose_to_beta(0.1 if smoke else DOSE, schedule)
    wrapped = prifu.wrap(net, beta=beta, cut="global_pool", noise=0.3)
    plain = train(net, task, schedule, "plain")
    train(wrapped, task, schedule, "wrapped")
    pruned = prifu.prune(wrapped)  # at the size of the last forward pass
    report = prifu.report(pruned)
    print(prifu.summary(wrapped), report, sep="\n\n", end="\n\n")
    models = {"plain": plain, "wrapped": wrapped, "pruned": pruned}
    ratios = latency_ratios(list(models.values()), task.images[:32], 5 if smoke else 30)
    columns = {"plain, projection": ["", "", ""]}
    for (name, model), ratio in zip(models.items(), ratios, strict=True):
        save_model(model, str(file := out / f"{name}.safetensors"))
        size = report.macs[name == "pruned"], file.stat().st_size // 1000
        columns[name] = [*(f"{n:,}" for n in size), f"{ratio:.2f}"]
    table = Table("", "task", "MACs", "file kB", "latency", *PRIVATE,
                  title="Even or odd? What the strongest of the attackers reads")  # fmt: skip
    for found in audits(models, task.images[:2], attack):
        read = [f"{row.accuracy.value:.3f} (floor {row.floor:.3f})" for row in found.attributes]
        table.add_row(found.name, f"{found.utility.value:.3f}", *columns[found.name], *read)
    Console(width=120).print(table)
    report.plot()[0].savefig(out / "channels.png", dpi=150)
    print(f"Picture: {out / 'channels.png'}. {len(attack[1])} test images: +-0.03 at 95 %. "
          "Empirical: a stronger attacker may read more.")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", default="out/quickstart")
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
