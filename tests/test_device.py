"""Everything once on another device, whose tensors may not meet the CPU's."""

import functools
import sys
from pathlib import Path

import pytest
import torch
import zoo
from elsewhere import DEVICE, Elsewhere, elsewhere
from torch import nn

import prifu_plugin as prifu
from prifu_plugin import baselines
from prifu_plugin.audit.data import uploads
from prifu_plugin.channel import Channel, Noise, Projection, Quantizer
from prifu_plugin.device import seeded

pytestmark = pytest.mark.device


@pytest.fixture(autouse=True)
def _there():
    with elsewhere():
        yield


def images(count=8, size=16):
    return torch.rand(count, 3, size, size).to(DEVICE)


def network():
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [nn.Conv2d(8, 12, 3, bias=False), nn.GroupNorm(3, 12), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 2)]
    return nn.Sequential(*layers).to(DEVICE)


def all_there(model):
    return all(isinstance(t, Elsewhere) for t in [*model.parameters(), *model.buffers()])


def test_devices_may_not_be_mixed():
    x = torch.rand(3, device=DEVICE)
    with pytest.raises(RuntimeError, match="two devices"):
        x + torch.rand(3)
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, device=DEVICE, generator=torch.Generator())
    with pytest.raises((RuntimeError, TypeError)):
        x.numpy()
    assert x.device == DEVICE
    assert x.cpu().device.type == "cpu"


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_network_is_wrapped_trained_and_pruned_where_it_is(name):
    model = zoo.build(name).to(DEVICE)
    size = zoo.image_size(name)
    wrapped = prifu.wrap(model)
    assert all_there(wrapped)
    optimizer = torch.optim.AdamW(wrapped.parameters(), 1e-3)
    before = [unit.weight.detach().clone() for unit in prifu.filters(wrapped).values()]
    wrapped(images(4, size)).square().mean().backward()
    optimizer.step()
    after = [unit.weight for unit in prifu.filters(wrapped).values()]
    assert all(bool((a != b).any()) for a, b in zip(after, before, strict=True))
    wrapped.eval()
    with torch.no_grad():
        for place, unit in enumerate(prifu.filters(wrapped).values()):
            unit.weight[place % 2 :: 2] = 0.0
    pruned = prifu.prune(wrapped, images(2, size))
    assert all_there(pruned)
    x = images(3, size)
    with torch.no_grad():
        assert (wrapped(x) - pruned(x)).abs().max().item() < 1e-5
    assert prifu.report(pruned).parameters[1] < prifu.report(pruned).parameters[0]


def test_plans_are_rebuilt_where_the_weights_are():
    wrapped = prifu.wrap(network()).eval()
    with torch.no_grad():
        prifu.filters(wrapped)["1"].weight[:4] = 0.0
    x = images()
    pruned = prifu.prune(wrapped, x)
    again = prifu.rebuild(network(), prifu.plan(pruned), pruned.state_dict())
    assert all_there(again)
    assert torch.equal(again(x).cpu(), pruned(x).cpu())


def test_filters_on_the_upload_and_schedules():
    model = prifu.wrap(network(), cut="6", noise=0.3, example_inputs=images())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    schedule = prifu.FilterSchedule(model, 4, alpha=(0.0, 0.1))
    for _ in range(4):
        schedule.step()
        optimizer.zero_grad()
        model(images()).square().mean().backward()
        optimizer.step()
    prifu.recalibrate(model, [images(), images()])
    history = prifu.MaskHistory(model)
    assert history.record(4)
    assert all_there(model)
    other = prifu.wrap(network(), bias=True).eval()
    prifu.absorb(other)
    assert all_there(other)


def test_relevance_and_thresholds():
    model = prifu.wrap(network()).eval()
    with torch.no_grad():
        model[-1].weight.normal_()
        inputs = [torch.rand(8, 3, 16, 16) for _ in range(4)]
        middle = model(inputs[0].to(DEVICE)).mean(0)
        model[-1].bias -= middle
    data = [(x, model(x.to(DEVICE)).argmax(1).cpu()) for x in inputs]
    found = prifu.relevance(model, data)
    assert len(found.layers) == 2
    prifu.influence(model, images(), torch.zeros(8, dtype=torch.long, device=DEVICE))
    assert len(prifu.sweep(model, data, [0.0, 0.5], macs=True)) == 2
    prifu.fit_alpha(model, data, max_drop=0.5, steps=3)


def test_split_and_channel():
    model = network().eval()
    x = images()
    edge, cloud = prifu.split(model, "6", x)
    z = edge(x).flatten(1)
    assert torch.allclose(cloud(edge(x)), model(x))
    channel = Channel(Noise(0.1, bytes(32)), Quantizer(4).fit(z.detach())).to(DEVICE).eval()
    assert torch.equal(channel.decode(channel.encode(z), z.shape).cpu(), channel(z).cpu())
    projection = Projection(model[-1])
    assert torch.allclose(projection.server()(projection(z)), model[-1](z), atol=1e-5)


@pytest.mark.parametrize("suite", ["quick", "standard"])
def test_an_audit_trains_its_networks_where_the_edge_is(suite):
    model = network().eval()
    x = torch.rand(240, 3, 16, 16)
    labels = {"task": (x[:, 0].mean((1, 2)) > 0.5).long(), "other": torch.arange(240) % 2}
    x[labels["other"] == 1, 1] *= 0.5
    data = prifu.AuditData(x, labels)
    edge, cloud = prifu.split(model, "2", images())
    report = prifu.audit(
        edge,
        data.at(torch.arange(160)),
        data.at(torch.arange(160, 240)),
        task="task",
        attributes=["other"],
        cloud=cloud,
        channel=Channel(Quantizer(6).fit(edge(images()))).to(DEVICE),
        suite=suite,
        seeds=1,
        reconstruct=["squared error"] if suite == "quick" else False,
    )
    assert report.attributes[0].accuracy.value > 0.9


RIVALS = {
    "task": baselines.TaskOnly,
    "CI": baselines.CI,
    "MaxEnt-ARL": baselines.MaxEntARL,
    "RAN": baselines.RAN,
    "PAN": baselines.PAN,
    "DISCO": functools.partial(baselines.DISCO, channels=8),
    "CFB": functools.partial(baselines.CFB, channels=8, spatial=True, strength=0.01),
    "NoPeek": baselines.NoPeekInfer,
    "VIB": functools.partial(baselines.VIB, channels=8, spatial=True, strength=0.01),
    "bottleneck": functools.partial(baselines.Bottleneck, channels=8, spatial=True, width=2),
    "noise": functools.partial(baselines.TrainedNoise, channels=8, spatial=True, noise=0.1),
    "Shredder": baselines.Shredder,
    "slimming": baselines.NetworkSlimming,
}


@pytest.mark.parametrize("name", RIVALS)
def test_rivals_train_where_the_model_is(name):
    torch.manual_seed(0)
    edge, cloud = prifu.split(network(), "2", images())
    defence = RIVALS[name](edge, cloud)
    x, task = torch.rand(64, 3, 16, 16), torch.arange(64) % 2
    schedule = baselines.Schedule(epochs=2, batch=16, finishing=4)
    fitted = baselines.fit(defence, x, task, 1 - task, schedule=schedule)
    assert all_there(fitted.edge)
    assert fitted.encode(x.to(DEVICE)).shape[1] > 0


@pytest.mark.parametrize("keep", ["channels", "directions"])
def test_what_is_removed_after_training_is_removed_there(keep):
    edge, cloud = prifu.split(network().eval(), "7", images())
    if keep == "channels":
        kept = baselines.keep_channels(edge, torch.rand(12), 3)
    else:
        kept = baselines.keep_directions(edge, cloud, 2)
    assert torch.isfinite(kept(images())).all()


@pytest.mark.parametrize(
    ("cut", "method", "settings"),
    [
        ("early", "plain", {"keep": 0.25, "order": "avgri"}),
        ("pooled", "plain", {"projection": True}),
        ("early", "PriFU", {"cut_filter": True, "rotated": True, "noise": 0.3, "ramped": True}),
        ("pooled", "DISCO", {"named": "colour", "strength": 0.3}),
        ("early", "CFB", {"named": "colour", "strength": 0.001}),
    ],
)
def test_the_papers_methods_are_deployed_there(cut, method, settings):
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "paper"))
    from lab.datasets import load
    from lab.methods import deploy
    from lab.runs import run_of
    from lab.scale import Scale

    scale = Scale("smoke", device=DEVICE)
    study = load("digits", scale)
    deployed = deploy(run_of(scale, method, 0, cut=cut, **settings), study, scale)
    assert all_there(deployed.edge)
    assert uploads(deployed.edge, study.test.images[:4], "a probe").device.type == "cpu"


def test_indices_are_drawn_where_the_model_is():
    layers = nn.Embedding(9, 8), nn.LayerNorm(8), nn.Flatten(), nn.Linear(40, 2)
    model, tokens = nn.Sequential(*layers).to(DEVICE).eval(), torch.randint(9, (2, 5)).to(DEVICE)
    edge, cloud = prifu.split(model, "1", tokens)
    assert isinstance(cloud(edge(tokens)), Elsewhere)


def test_data_of_an_audit_may_be_there():
    bits = torch.randint(2, (2, 400))
    x = torch.rand(400, 3, 8, 8) * 0.3
    x[:, 0] += 0.5 * bits[0][:, None, None]
    x[:, 1] += 0.5 * bits[1][:, None, None]
    data = prifu.AuditData(
        x.to(DEVICE), {"task": bits[0].to(DEVICE), "private": bits[1].to(DEVICE)}
    )
    parts = data.at(torch.arange(300)), data.at(torch.arange(300, 400))
    edge = nn.Sequential(nn.Flatten(), nn.Linear(192, 16)).to(DEVICE).eval()
    settings = {"suite": "quick", "seeds": 1, "reconstruct": False}
    report = prifu.audit(edge, *parts, task="task", attributes=["private"], **settings)
    assert report.attributes[0].accuracy.value > 0.9


def test_the_one_generator_of_mps_is_seeded_and_put_back(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: "before")
    monkeypatch.setattr(torch.mps, "manual_seed", lambda seed: calls.append(seed))
    monkeypatch.setattr(torch.mps, "set_rng_state", calls.append)
    with seeded(3, torch.device("mps")):
        assert calls == [3]
    assert calls == [3, "before"]
