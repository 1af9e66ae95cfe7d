"""Methods by name: trained on a study, and as deployed, edge, cloud and channel."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import prifu_plugin as prifu
from lab.datasets import Study
from lab.forms import Scheduled, filtered
from lab.networks import CUTS, build
from lab.pretrained import pretrained
from lab.scale import Scale
from prifu_plugin import baselines
from prifu_plugin.audit.data import uploads
from prifu_plugin.channel import Channel, Projection, Quantizer

RIVALS = {
    "CI": baselines.CI,
    "MaxEnt-ARL": baselines.MaxEntARL,
    "RAN": baselines.RAN,
    "PAN": baselines.PAN,
    "DISCO": baselines.DISCO,
    "CFB": baselines.CFB,
    "NoPeek-Infer": baselines.NoPeekInfer,
    "VIB": baselines.VIB,
    "bottleneck": baselines.Bottleneck,
    "noise": baselines.TrainedNoise,
    "Shredder": baselines.Shredder,
    "slimming": baselines.NetworkSlimming,
}
NEEDS_SHAPE = ("CFB", "VIB", "bottleneck", "noise")
AFTERWARDS = ("bits", "projection", "keep", "order", "directions")
"""Settings that change an upload after training."""


@dataclass(frozen=True)
class Deployed:
    """What runs on the phone, what runs behind it, and what is between them.

    Attributes:
        edge: images -> upload.
        cloud: what arrives -> logits.
        channel: what uploads pass through.
        model: the whole network, as trained.
    """

    edge: nn.Module
    cloud: nn.Module
    channel: Channel | None
    model: nn.Module


def deploy(run: dict[str, Any], study: Study, scale: Scale) -> Deployed:
    """Train what a run asks for and change its upload as asked."""
    settings = run["settings"]
    before = {k: v for k, v in settings.items() if k not in AFTERWARDS}
    key = run["network"], run["cut"], run["method"], tuple(sorted(before.items())), run["seed"]
    edge, cloud, model = _trained(key, study, scale)
    images = study.defence.images
    if settings.get("projection"):
        edge, cloud = _projected(edge, cloud)
    if "keep" in settings:
        ranked = _avgri(edge, cloud, study) if settings["order"] == "avgri" else None
        size = uploads(edge, images[:2], "a probe").shape[1]
        chance = torch.rand(size, generator=torch.Generator().manual_seed(run["seed"]))
        count = max(1, round(settings["keep"] * size))
        edge = baselines.keep_channels(edge, chance if ranked is None else ranked, count)
    if "directions" in settings:
        edge = baselines.keep_directions(edge, cloud, settings["directions"])
    channel = None
    if "bits" in settings:
        # The codec's range comes from the defender's own images.
        sent = uploads(edge, images[:1000], "what a codec is fitted to")
        channel = Channel(Quantizer(settings["bits"]).fit(sent)).eval()
    return Deployed(edge.eval(), cloud.eval(), channel, model)


@functools.lru_cache(maxsize=4)
def _trained(key: tuple, study: Study, scale: Scale) -> tuple[nn.Module, nn.Module, nn.Module]:
    network, cut, method, items, seed = key
    settings = dict(items)
    at = CUTS[network][cut]
    if network in ("pretrained-resnet", "imagenet-lite0"):
        model = pretrained(network, study.classes, seed, scale)
    else:
        model = build(network, study.classes, seed)
    model = model.to(scale.device)
    first = study.defence.images[:4].to(scale.device)
    if method == "untrained":
        return (*prifu.split(model.eval(), at, first), model)
    if method == "PriFU":
        model = filtered(model, at, first, settings, len(study.defence), scale)
    edge, cloud = prifu.split(model, at, first)
    torch.manual_seed(seed)
    steps = len(scale.schedule.rates(len(study.defence)))
    defence: nn.Module = Scheduled(edge, cloud, model, settings, steps)
    if method in RIVALS:
        z = edge.eval()(first)
        shape = {"channels": z.shape[1], "spatial": z.ndim == 4} if method in NEEDS_SHAPE else {}
        shape |= {"channels": z.shape[1]} if method == "DISCO" else {}
        options = {k: v for k, v in settings.items() if k != "named"}
        defence = RIVALS[method](edge, cloud, **shape, **options)
    labels = study.defence.labels
    named = settings.get("named")
    baselines.fit(
        defence,
        study.defence.images,
        labels[study.task],
        labels[named] if named else None,
        schedule=scale.schedule,
        seed=seed,
        desc=f"{method}, {cut}, seed {seed}",
    )
    return defence.edge, defence.cloud, model


def _projected(edge: nn.Module, cloud: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Send what a linear head of two classes can see, one number: the difference of the logits."""
    head = next(m for m in cloud.modules() if isinstance(m, nn.Linear))
    if any(isinstance(m, nn.Conv2d) for m in cloud.modules()) or head.out_features != 2:
        raise ValueError("Only a cloud that is one linear head of two classes is projected.")
    device = head.weight.device
    difference = nn.Linear(head.in_features, 1).to(device)
    with torch.no_grad():
        difference.weight.copy_(head.weight[1:] - head.weight[:1])
        difference.bias.copy_(head.bias[1:] - head.bias[:1])
    projection = Projection(difference)
    two = nn.Linear(1, 2).to(device)
    with torch.no_grad():
        two.weight.copy_(torch.tensor([[-0.5], [0.5]]))
        two.bias.zero_()
    flat = nn.Flatten()
    return nn.Sequential(edge, flat, projection), nn.Sequential(projection.server(), two)


def _avgri(edge: nn.Module, cloud: nn.Module, study: Study) -> Tensor:
    """Return the AvgRI (Eq. 2) of the upload's channels."""
    images, target = study.defence.images[:1000], study.defence.labels[study.task][:1000]
    z = uploads(edge, images, "uploads")
    maps = prifu.influence(cloud, z, target)
    return maps.reshape(*maps.shape[:2], -1).mean((0, 2))
