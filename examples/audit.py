"""Audit: what do a smile detector's uploads tell about who smiles?

A small timm network learns on generated faces whether they smile: plainly, wrapped (filters
everywhere), and as recommended (one filter more on the upload, growing noise, 4 bits a value).
Each is cut at two places and attacked; one page shows what was read, beside floors and ceilings.

    python examples/audit.py    # a quarter of an hour on two cores; with --smoke, one minute
"""

import argparse
from pathlib import Path

import rich
import timm
import torch
from tqdm import tqdm

import prifu_plugin as prifu
from prifu_plugin.audit.page import html
from prifu_plugin.channel import Channel, Quantizer
from prifu_plugin.data.faces import generate_faces

SIZE, RATE, BATCH, EPOCHS, DOSE, NOISE = 48, 0.05, 64, 12, 2.6, 0.3
CUTS = {"pooled": "global_pool", "early": "layer2"}
PRIVATE = ["glasses", "beard", "hair_colour"]


def network(seed):
    """Return an untrained network."""
    torch.manual_seed(seed)
    return timm.create_model("test_resnet", num_classes=2)


def train(model, faces, name, epochs, noisy=False):
    """Train with an ordinary loop, blind to private labels; noise on the upload grows to NOISE."""
    steps = epochs * (len(faces) // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4)
    schedules = [torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)]
    if noisy:
        schedules += [prifu.FilterSchedule(model, steps, noise=(0.0, NOISE), until=0.5)]
    smiling = faces.labels["smiling"]
    model.train()
    for step in tqdm(range(steps), desc=name, disable=None):
        pick = torch.randint(len(faces), (BATCH,), generator=torch.Generator().manual_seed(step))
        loss = torch.nn.functional.cross_entropy(model(faces.images[pick]), smiling[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for schedule in schedules:
            schedule.step()
    return model.eval()


def beta_for(dose, epochs, faces):
    """Return the beta that gives a dose of decay over the schedule of `train`."""
    steps = epochs * (len(faces) // BATCH)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return prifu.dose_to_beta(dose, rates)


def audit(model, at, faces, data, **settings):
    """Cut a model and attack what it uploads there."""
    edge, cloud = prifu.split(model, at, faces.images[:2])
    channel = None
    if settings.pop("bits", None):
        with torch.no_grad():  # the range of the codec comes from the defender's own images
            sent = torch.cat([edge(part) for part in faces.images[:1000].split(250)])
        channel = Channel(Quantizer(4).fit(sent))
    return prifu.audit(edge, *data, task="smiling", cloud=cloud, channel=channel, **settings)


def main(smoke=False, out="out/audit", seed=0):
    """Train, cut, attack, and write the page."""
    (out := Path(out)).mkdir(parents=True, exist_ok=True)
    counts = (400, 300, 150) if smoke else (2000, 1200, 600)  # defender, attacker, test
    faces = generate_faces(sum(counts), SIZE, seed=seed)
    ends = [sum(counts[:i]) for i in range(4)]
    parts = [faces.part(a, b) for a, b in zip(ends, ends[1:], strict=False)]
    data = [prifu.AuditData(part.images, part.labels) for part in parts[1:]]
    epochs = 1 if smoke else EPOCHS
    beta = beta_for(0.1 if smoke else DOSE, epochs, parts[0])
    settings = {"suite": "quick" if smoke else "standard", "seeds": 1, "seed": seed,
                "reconstruct": ["squared error"],  # True trains a decoder on each of three losses
                "attributes": PRIVATE[:2] if smoke else PRIVATE}  # fmt: skip
    first = parts[0].images[:2]
    plain = train(network(seed), parts[0], "plain", epochs)
    wrapped = train(prifu.wrap(network(seed), beta=beta), parts[0], "wrapped", epochs)
    reports = []
    for cut, at in list(CUTS.items())[: 1 if smoke else 2]:
        protected = prifu.wrap(network(seed), beta=beta, cut=at, noise=NOISE, example_inputs=first)
        train(protected, parts[0], f"recommended, {cut}", epochs, noisy=True)
        untrained = prifu.split(network(seed + 1).eval(), at, first).edge
        known = {"input": reports[0]} if reports else {}  # images are attacked once
        bare = audit(plain, at, parts[0], data, name=f"plain, {cut}",
                     references={"untrained": untrained, **known}, **settings)  # fmt: skip
        settings["references"] = {"plain": bare}
        reports += [bare, audit(wrapped, at, parts[0], data, name=f"wrapped, {cut}", **settings)]
        recommended = {"bits": 4, "name": f"recommended, {cut}", **settings}
        reports += [audit(protected, at, parts[0], data, **recommended)]
        del settings["references"]
    for report in reports:
        rich.print(report)
        (out / f"{report.name.replace(', ', '_')}.json").write_text(report.to_json())
    (out / "report.html").write_text(html(reports, "What does a smile detector upload?"))
    print(f"Report: {out / 'report.html'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="a minute's run on few faces")
    parser.add_argument("--out", default="out/audit")
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
