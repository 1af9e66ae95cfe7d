"""Rivals and controls on planted data: each takes away what it says, and keeps the task."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prifu_plugin as prifu
from prifu_plugin import baselines
from prifu_plugin.audit.inference import infer, prepare
from prifu_plugin.audit.reconstruction import reconstruct
from prifu_plugin.baselines.base import Batch
from prifu_plugin.baselines.disco import Gate
from prifu_plugin.baselines.nopeek import distance_correlation
from prifu_plugin.baselines.opponents import reverse_gradient
from prifu_plugin.baselines.removal import server_map
from prifu_plugin.errors import ConfigError, OrderError

CHANNELS = 16
SCHEDULE = baselines.Schedule(epochs=12, batch=32, rate=0.05, finishing=60)


def planted(count=1200, seed=0):
    """Images whose brighter half is the task and whose stripes are private, independently."""
    g = torch.Generator().manual_seed(seed)
    task, private = (torch.randint(2, (count,), generator=g) for _ in range(2))
    images = 0.3 * torch.rand(count, 1, 8, 8, generator=g) + 0.2
    images[:, 0, :, :4] += 0.08 * (1 - task)[:, None, None]
    images[:, 0, :, 4:] += 0.08 * task[:, None, None]
    images[:, 0, ::2] += 0.04 * private[:, None, None]
    images[:, 0, 1::2] += 0.04 * (1 - private)[:, None, None]
    return images, task, private


def parts(at="5", seed=0):
    """A small network cut at its pooled vector ("5") or at a map ("2")."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS), nn.ReLU(),
        nn.Conv2d(CHANNELS, CHANNELS, 3, 2, 1), nn.BatchNorm2d(CHANNELS),
        nn.Sequential(nn.ReLU(), nn.AvgPool2d((4, 2)), nn.Flatten()),
        nn.Linear(2 * CHANNELS, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2),
    )  # fmt: skip
    return prifu.split(net, at, torch.rand(2, 1, 8, 8))


def shape(at):
    return {"channels": 2 * CHANNELS if at == "5" else CHANNELS, "spatial": at == "2"}


def attacked(defence, private, images, task, seed=0):
    """Task accuracy, and what the quick suite reads of the private label."""
    z = defence.encode(images)
    with torch.no_grad():
        right = (defence.cloud(z).argmax(1) == task)[900:].double().mean()
    uploads = prepare(z[:700], z[700:900], z[900:], "quick")
    labels = private[:700], private[700:900], private[900:]
    found = infer(uploads, labels, 2, seed)
    return float(right), float((found.scores.argmax(1) == labels[2]).double().mean())


def trained(make, at="5", named=True, seed=0):
    edge, cloud = parts(at, seed)
    images, task, private = planted(seed=10 * seed)
    torch.manual_seed(seed)
    defence = make(edge, cloud)
    return baselines.fit(defence, images, task, private if named else None, schedule=SCHEDULE)


@pytest.fixture(scope="module")
def plain():
    return {at: trained(baselines.TaskOnly, at) for at in ("5", "2")}


def psnr(defence, images, task):
    z = defence.encode(images)
    pairs = [(z[:700], images[:700]), (z[700:900], images[700:900]), (z[900:], images[900:])]
    answers = task[:700], task[900:]
    return reconstruct(*pairs, answers, steps=120, losses=("squared error",)).best.psnr


NAMED = {
    "ci": lambda e, c: baselines.CI(e, c, strength=3.0),
    # At strength 10, as of PAN below, judged() reads as much of it as of the plain network.
    "maxent_arl": lambda e, c: baselines.MaxEntARL(e, c, strength=50.0),
    "pan": lambda e, c: baselines.PAN(e, c, strength=10.0),
    "disco": lambda e, c: baselines.DISCO(e, c, channels=32, strength=5.0, remove=0.8),
    "cfb": lambda e, c: baselines.CFB(e, c, **shape("5"), strength=0.02),
}


LATER = {"pan": pytest.mark.long}
"""A minute; in CI, PAN is tried on maps below."""


@pytest.fixture(scope="module")
def read_of_plain():
    return judged(baselines.TaskOnly)[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=LATER.get(n, ())) for n in NAMED])
def test_what_is_named_is_harder_to_read_and_the_task_stays(name, read_of_plain):
    right, read = judged(NAMED[name])
    assert read_of_plain > 0.75
    assert right > 0.95
    assert read < read_of_plain - 0.03


def judged(make, seeds=3):
    """The means of `attacked` over seeds: one network's leak is off by five points and more."""
    runs = []
    for seed in range(seeds):
        images, task, private = planted(2400, seed=10 * seed + 1)
        runs.append(attacked(trained(make, seed=seed), private, images, task))
    return torch.tensor(runs).mean(0).tolist()


WIDE = {
    "ran": lambda e, c: baselines.RAN(e, c, strength=3.0),
    "pan": lambda e, c: baselines.PAN(e, c, strength=6.0),
    "nopeek": lambda e, c: baselines.NoPeekInfer(e, c, strength=3.0),
    "disco": lambda e, c: baselines.DISCO(e, c, channels=CHANNELS, strength=5.0, remove=0.8),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.long] * (n == "disco")) for n in WIDE]
)  # which is judged by what is named, too
def test_images_are_harder_to_reconstruct_and_the_task_stays(name, plain):
    images, task, private = planted(seed=1)
    named = name == "pan"
    defended = trained(WIDE[name], "2", named)
    right = (defended.cloud(defended.encode(images)).argmax(1) == task).double().mean()
    assert right > 0.95
    assert psnr(defended, images, task) < psnr(plain["2"], images, task) - 2


@pytest.mark.slow
@pytest.mark.parametrize("at", ["5", pytest.param("2", marks=pytest.mark.long)])
def test_information_limiters_take_what_nobody_named(at, plain):
    images, task, private = planted(seed=1)
    before = attacked(plain[at], private, images, task)
    for make in (
        lambda e, c: baselines.VIB(e, c, **shape(at), strength=0.02),
        lambda e, c: baselines.TrainedNoise(e, c, **shape(at), noise=2.0),
    ):
        after = attacked(trained(make, at, named=False), private, images, task)
        assert after[0] > 0.9
        assert after[1] < before[1] - 0.1


@pytest.mark.slow
def test_shredder_costs_an_attacker_more_than_the_task(plain):
    images, task, private = planted(seed=1)
    defence = trained(lambda e, c: baselines.Shredder(e, c, strength=0.03), named=False)
    before, after = (attacked(d, private, images, task) for d in (plain["5"], defence))
    assert after[0] > 0.85
    assert before[1] - after[1] > 0.1 + before[0] - after[0]
    assert not torch.equal(defence.encode(images[:4]), defence.encode(images[:4]))


def test_slimming_zeroes_a_share_of_the_norms_scales():
    short = baselines.Schedule(epochs=1, batch=64, finishing=3)
    edge, cloud = parts()
    images, task, _ = planted(256)
    slim = baselines.NetworkSlimming(edge, cloud, strength=1e-3, remove=0.5)
    baselines.fit(slim, images, task, schedule=short)
    scales = torch.cat([m.weight for m in slim.modules() if isinstance(m, nn.BatchNorm2d)])
    scales = torch.cat(
        [scales, *[m.weight for m in cloud.modules() if isinstance(m, nn.BatchNorm1d)]]
    )
    assert (scales == 0).sum() == len(scales) // 2
    off = [m for m in slim.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all((m.bias[m.weight == 0] == 0).all() for m in off)


def test_gradients_of_the_edges_turn_train_no_adversary():
    images, task, private = planted(64)
    edge, cloud = parts()
    ci = baselines.CI(edge, cloud, strength=1.0)
    optimizer = torch.optim.SGD(ci.defenders(), lr=0.1)
    ci.begin(Batch(images, task, private), 2, optimizer)
    trained_by_main = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not trained_by_main & {id(p) for p in ci.adversary.parameters()}
    before = [p.detach().clone() for p in edge.parameters()]
    ci.play(ci.edge(images).detach(), Batch(images, task, private))
    assert all(torch.equal(a, b) for a, b in zip(before, edge.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["CI", "MaxEntARL", "PAN"])
def test_the_adversarial_term_is_bounded(kind):
    """Even an adversary that is sure and wrong cannot pay the edge more than chance."""
    images, task, private = planted(64)
    edge, cloud = parts()
    defence = getattr(baselines, kind)(edge, cloud, strength=2.0)
    batch = Batch(images, task, private)
    defence.begin(batch, 2, torch.optim.SGD(defence.defenders(), lr=0.1))
    defence.progress = 1.0
    head = defence.adversary.net[-1]
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([100.0, -100.0]))
    z = defence.edge(images)
    loss, terms = defence.loss(z, batch)
    lost = terms["task"] - float(loss.detach())
    if kind == "MaxEntARL":
        assert -2 * math.log(2) - 1e-5 <= lost <= 1e-5
    else:
        assert lost <= 2 * max(1, math.log(2)) + 1e-5
    assert terms.get("adversary", math.inf) > 1


def test_distance_correlation_against_its_definition():
    g = torch.Generator().manual_seed(0)
    x, z = torch.randn(12, 3, generator=g).double(), torch.randn(12, 5, generator=g).double()
    n = len(x)

    def centred(data):
        a = [[float((data[i] - data[j]).norm()) for j in range(n)] for i in range(n)]
        total = sum(map(sum, a))
        return [
            [
                0.0 if i == j else a[i][j] - sum(a[i]) / (n - 2)
                - sum(row[j] for row in a) / (n - 2) + total / ((n - 1) * (n - 2))
                for j in range(n)
            ]
            for i in range(n)
        ]  # fmt: skip

    def inner(a, b):
        return sum(a[i][j] * b[i][j] for i in range(n) for j in range(n))

    a, b = centred(x), centred(z)
    expected = inner(a, b) / math.sqrt(inner(a, a) * inner(b, b))
    assert float(distance_correlation(x, z)) == pytest.approx(expected, rel=1e-9)


def test_distance_correlation_of_independent_wide_data_is_about_zero():
    g = torch.Generator().manual_seed(0)
    found = [
        float(
            distance_correlation(
                torch.randn(64, 300, generator=g), torch.randn(64, 100, generator=g)
            )
        )
        for _ in range(40)
    ]
    assert abs(sum(found) / len(found)) < 0.05
    same = torch.randn(64, 300, generator=g)
    same.requires_grad_()
    distance_correlation(torch.randn(64, 30, generator=g), same).backward()
    assert torch.isfinite(same.grad).all()


def test_reversed_gradients():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    (reverse_gradient(x, 3.0) * torch.tensor([1.0, 10.0])).sum().backward()
    assert x.grad.tolist() == [-3.0, -30.0]


def test_a_gate_belongs_to_one_image_and_lets_gradients_through():
    torch.manual_seed(0)
    gate = Gate(10, 0.5).eval()
    z = torch.randn(6, 10, 4, 4)
    together = gate(z)
    alone = torch.cat([gate(one[None]) for one in z])
    torch.testing.assert_close(together, alone)
    g = gate.gate(z)
    assert g.shape == (6, 10, 1, 1)
    assert len({tuple((row > 0.5).flatten().tolist()) for row in g}) > 1
    g.sum().backward()
    assert any(p.grad is not None and (p.grad != 0).any() for p in gate.parameters())


def test_kept_directions_of_full_rank_keep_the_function():
    for at in ("5", "2"):
        edge, cloud = parts(at)
        edge.eval(), cloud.eval()
        x = torch.rand(8, 1, 8, 8)
        if at == "2":
            with pytest.raises(ConfigError, match="linear layer"):
                server_map(prifu.split(nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU()), "0", x).cloud)
        rank = min(server_map(cloud).shape)
        narrow = baselines.keep_directions(edge, cloud, rank)
        torch.testing.assert_close(cloud(narrow(x)), cloud(edge(x)), rtol=1e-4, atol=1e-5)
        z = baselines.keep_directions(edge, cloud, 2)(x).movedim(1, -1).flatten(0, -2)
        assert torch.linalg.matrix_rank(z.double(), rtol=1e-5) <= 2


def test_methods_without_their_label_or_out_of_order_are_refused():
    images, task, _ = planted(64)
    edge, cloud = parts()
    with pytest.raises(ConfigError, match="private"):
        baselines.fit(baselines.CI(edge, cloud, strength=1.0), images, task)
    with pytest.raises(ConfigError, match="strength"):
        baselines.RAN(edge, cloud, strength=-1.0)
    with pytest.raises(ConfigError, match="fewer than a batch"):
        baselines.fit(baselines.TaskOnly(edge, cloud), images[:10], task[:10])
    for make in (baselines.TaskOnly, baselines.VIB, baselines.DISCO):
        extra = {} if make is baselines.TaskOnly else {"channels": 32}
        extra |= {"spatial": False} if make is baselines.VIB else {}
        with pytest.raises(OrderError, match="begin"):
            make(edge, cloud, **extra).step(Batch(images, task))
    with pytest.raises(ConfigError, match="keep at least one"):
        baselines.keep_channels(edge, torch.rand(32), 0)
    with pytest.raises(ConfigError, match="remove"):
        baselines.NetworkSlimming(edge, cloud, remove=1.0)


def test_filters_decay_inside_a_defence():
    """A wrapped network trains in any method: the hook needs nothing of it."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2)
    )
    images, task, _ = planted(256)
    schedule = baselines.Schedule(epochs=2, batch=64, finishing=0)
    dose = 1.5
    beta = prifu.dose_to_beta(dose, schedule.rates(len(images)))
    wrapped = prifu.wrap(net, beta=beta, example_inputs=images[:2])
    edge, cloud = prifu.split(wrapped, "2", images[:2])
    baselines.fit(baselines.TaskOnly(edge, cloud), images, task, schedule=schedule)
    assert prifu.filters(wrapped)["1"].dose == pytest.approx(dose, rel=1e-6)


def test_one_step_of_training_is_the_losses_own_gradient():
    """TaskOnly is plain SGD on the cross-entropy."""
    images, task, _ = planted(64)
    edge, cloud = parts()
    reference = [p.detach().clone().requires_grad_() for p in cloud.parameters()]
    plain = baselines.TaskOnly(edge, cloud)
    schedule = baselines.Schedule(epochs=1, batch=64, rate=0.1, drops=(2, 2), finishing=0)
    edge.train(), cloud.train()
    names = [name for name, _ in cloud.named_parameters()]
    z = edge(images).detach()
    out = torch.func.functional_call(cloud, dict(zip(names, reference, strict=True)), (z,))
    grads = torch.autograd.grad(F.cross_entropy(out, task), reference)
    before = [p.detach().clone() for p in cloud.parameters()]
    baselines.fit(plain, images, task, schedule=schedule)
    for name, p, b, g in zip(names, cloud.parameters(), before, grads, strict=True):
        torch.testing.assert_close(p.detach(), b - 0.1 * g, rtol=1e-4, atol=1e-6, msg=name)


def test_a_narrow_map_begins_with_the_scale_of_its_input():
    edge, cloud = parts()
    narrow = baselines.VIB(edge, cloud, **shape("5"), width=2)
    x = torch.randn(64, 32)
    directions = torch.linalg.svd(narrow.mean[1].weight).Vh[:2]
    expected = (x @ directions.T).norm(dim=1)
    assert torch.allclose((x @ narrow.mean[1].weight.T).norm(dim=1), expected, atol=1e-4)


def test_a_gate_hardens_over_the_first_half_of_training():
    images, task, private = planted(96)
    defence = baselines.DISCO(*parts(), channels=32, strength=0.3)
    batch = Batch(images, task, private)
    defence.begin(batch, 2, torch.optim.SGD(defence.defenders(), lr=0.0))
    defence.train()
    found = []
    for defence.progress in (0.0, 0.25, 0.5, 0.9):
        defence.step(batch)
        found.append(defence.pruner.sharpness)
    assert found == pytest.approx([1.0, math.sqrt(30), 30, 30])


def test_a_cloud_that_was_told_goes_on_with_the_average_of_what_it_was_told():
    images, task, private = planted(96)
    private[:72] = 1
    private[72:] = 0
    defence = baselines.CFB(*parts(), **shape("5"))
    batch = Batch(images, task, private)
    defence.begin(batch, 2, torch.optim.SGD(defence.defenders(), lr=0.1))
    before = defence.enter.bias.detach().clone()
    told = defence.told(torch.eye(2)).detach()
    defence.finish([batch])  # one step of Adam moves a bias by at most its rate, 0.001
    wanted = before + 0.75 * told[1] + 0.25 * told[0]
    assert torch.allclose(defence.enter.bias, wanted, atol=1.1e-3)
    assert not torch.allclose(before, wanted, atol=1e-2)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)

    def forward(self, x):
        return self.patches(x).flatten(2).transpose(1, 2)


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 2)

    def forward(self, z):
        return self.linear(z.mean(1))


ON_TOKENS = {
    "RAN": {"strength": 0.3},
    "PAN": {"strength": 0.3},
    "DISCO": {"channels": 8},
    "CFB": {"channels": 8, "spatial": True, "strength": 0.01},
    "VIB": {"channels": 8, "spatial": True, "strength": 0.01},
    "Bottleneck": {"channels": 8, "spatial": True, "width": 2},
    "TrainedNoise": {"channels": 8, "spatial": True, "noise": 1.0},
    "CI": {"strength": 0.3},
    "NoPeekInfer": {"strength": 0.3},
}


@pytest.mark.parametrize("name", ON_TOKENS)
def test_tokens_are_defended_as_maps(name):
    torch.manual_seed(0)
    x, task = torch.rand(64, 3, 16, 16), torch.arange(64) % 2
    schedule = baselines.Schedule(epochs=1, batch=32, finishing=0)
    cls, edge, cloud = getattr(baselines, name), Tokens(), Reader()
    settings = ON_TOKENS[name]
    maps = baselines.tokens_as_maps(edge, cloud)
    defence = baselines.fit(cls(*maps, **settings), x, task, 1 - task, schedule=schedule)
    z = defence.encode(x)
    assert z.ndim == 4
    assert z.shape[2:] == (16, 1)
    assert defence.cloud(z).shape == (64, 2)
    if not cls.takes_tokens:
        with pytest.raises(ConfigError, match="tokens_as_maps"):
            baselines.fit(cls(edge, cloud, **settings), x, task, 1 - task, schedule=schedule)


@pytest.mark.parametrize(
    ("task", "private"),
    [
        (torch.zeros(3, dtype=torch.long), None),
        (torch.zeros(8), None),
        (torch.zeros(8, dtype=torch.long), {"p": torch.zeros(8)}),
    ],
)
def test_labels_that_do_not_fit_are_refused(task, private):
    edge, cloud = nn.Linear(4, 3), nn.Linear(3, 2)
    with pytest.raises(ConfigError, match="one class an image"):
        baselines.fit(baselines.RAN(edge, cloud, strength=0.3), torch.rand(8, 4), task, private)
