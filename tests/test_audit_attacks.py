"""Attacks on uploads with planted leaks: each is found, and nothing is found where nothing is."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prifu_plugin as prifu
from prifu_plugin.audit import decoders
from prifu_plugin.audit.attackers import Sample, boosting
from prifu_plugin.audit.controls import controls
from prifu_plugin.audit.inference import infer, prepare
from prifu_plugin.audit.least_squares import PENALTIES, least_squares, with_one
from prifu_plugin.audit.preparation import is_spatial, maps, rank, standardize, whiten
from prifu_plugin.audit.reconstruction import reconstruct
from prifu_plugin.audit.similarity import similarity
from prifu_plugin.audit.statistics import calibrated, metrics
from prifu_plugin.audit.tail import repurposed
from prifu_plugin.channel import Channel, Quantizer
from prifu_plugin.errors import ConfigError

SIZES = (900, 300, 400)


def planted(kind, seed=0, width=20):
    """Uploads of 20 numbers, and a private bit hidden in them."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(SIZES)
    z = torch.randn(count, width, generator=generator)
    bit = torch.randint(2, (count,), generator=generator)
    if kind == "linear":
        z[:, 3] += 4 * bit
    elif kind == "small":
        z[:, 3] = 1e-4 * (bit + 0.1 * z[:, 3])
    elif kind == "hidden":
        # Far below the noise in each value, but not in the direction in which they agree.
        z[:, 4] = z[:, 3] + 1e-4 * (bit - 0.5) + 1e-5 * z[:, 5]
    elif kind == "xor":
        bit = ((z[:, 3] > 0) ^ (z[:, 7] > 0)).long()
    elif kind == "monotone":
        z[:, 3] = (8 * (bit + 0.2 * z[:, 3])).exp()
    return z, bit


def parts(values):
    return values.split(SIZES)


def accuracy(kind, suite="standard", seed=0):
    z, bit = planted(kind, seed)
    found = infer(prepare(*parts(z), suite), parts(bit), 2)
    return float((found.scores.argmax(1) == parts(bit)[2]).double().mean()), found


@pytest.mark.parametrize(
    "kind", ["linear", "small", "hidden", "xor", pytest.param("monotone", marks=pytest.mark.slow)]
)
def test_a_planted_leak_is_read(kind):
    right, found = accuracy(kind)
    assert right > 0.9, (found.winner, found.validation)
    if kind == "hidden":
        assert "whitened" in found.winner
        weak = {n: v for n, v in found.validation.items() if n.startswith(("raw", "standard"))}
        assert min(weak.values()) < 0.7  # what a naive attacker would have reported


@pytest.mark.slow
def test_the_full_suite_trains_every_attacker_on_every_preparation():
    z, bit = planted("none")
    found = infer(prepare(*parts(z), "full"), parts(bit), 2)
    names = {tuple(name.rsplit(" ", 1)) for name in found.validation}
    preparations = {"raw", "standardized", "whitened", "ranked"}
    attackers = {"ridge", "logistic", "mlp", "neighbours", "boosting"}
    assert names == {(p, a) for p in preparations for a in attackers}
    maps = {p.name for p, *_ in prepare(*parts(z.reshape(-1, 5, 2, 2)), "full").parts}
    assert {"raw", "ranked"} <= {name.removesuffix(" values") for name in maps}


@pytest.mark.parametrize("scale", [1.0, 1e-13])
def test_a_hidden_leak_among_many_values(scale):
    z, bit = planted("hidden", width=400)
    found = infer(prepare(*parts(z * scale), "quick"), parts(bit), 2)
    assert (found.scores.argmax(1) == parts(bit)[2]).double().mean() > 0.9, found.validation


def weak_channel(shape, dim):
    """Maps or tokens of channels on many scales, the deviation of a weak one of which tells."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(sum(SIZES), *shape, generator=generator)
    bit = torch.randint(2, (sum(SIZES),), generator=generator)
    channels = z.movedim(dim, 1)
    scale = torch.logspace(2, -2, channels.shape[1])
    channels *= scale.reshape(1, -1, *[1] * (z.ndim - 2))
    channels[:, 17] *= (0.5 + bit).reshape(-1, *[1] * (z.ndim - 2))
    return z, bit


@pytest.mark.parametrize(
    ("shape", "dim"),
    [((24, 12, 12), 1), ((12, 12, 24), -1), ((8, 18, 24), -1), ((24, 144), 1), ((144, 24), -1)],
)
def test_a_leak_in_one_channel_wherever_the_channels_are(shape, dim):
    z, bit = weak_channel(shape, dim)
    found = infer(prepare(*parts(z), "quick"), parts(bit), 2)
    assert (found.scores.argmax(1) == parts(bit)[2]).double().mean() > 0.9, found.validation
    assert "moments" in found.winner


@pytest.mark.parametrize(
    ("shape", "channels"), [((24, 12, 12), 24), ((12, 12, 24), 24), ((144, 24), 24)]
)
def test_networks_read_channels_where_they_are(shape, channels):
    z = torch.randn(50, *shape)
    assert {prepared.transform(z).shape[1] for prepared in maps(z)} == {channels}
    assert is_spatial(z) is (len(shape) == 3)


@pytest.mark.slow
def test_where_nothing_is_nothing_is_read():
    rights = [accuracy("none", seed=seed)[0] for seed in range(3)]
    assert abs(sum(rights) / 3 - 0.5) < 0.05


@pytest.mark.slow
def test_maps_are_attacked_as_maps():
    generator = torch.Generator().manual_seed(0)
    count = sum(SIZES)
    z = torch.randn(count, 2, 10, 10, generator=generator)
    bit = torch.randint(2, (count,), generator=generator)
    # A pattern of zero mean at a random place: neither moments nor position help.
    for i in range(count):
        y, x = torch.randint(8, (2,), generator=generator)
        sign = 1 if bit[i] else -1
        z[i, 1, y : y + 3, x : x + 3] += (
            3.0 * torch.tensor([[0, 1, 0], [-1, 0, -1], [0, 1, 0]]) * sign
        )
    found = infer(prepare(*parts(z), "standard"), parts(bit), 2)
    assert found.winner.endswith("convnet")
    assert (found.scores.argmax(1) == parts(bit)[2]).double().mean() > 0.85


class Knowing(nn.Module):
    """A tail that computes the parity of five signs, which few samples do not teach."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(20, 20)
        nn.init.eye_(self.enter.weight)
        nn.init.zeros_(self.enter.bias)
        self.head = nn.Linear(1, 2)

    def forward(self, z):
        return self.head(self.enter(z.clamp_(-9, 9))[:, :5].sign().prod(1, keepdim=True))


@pytest.mark.slow
def test_what_the_tasks_tail_has_learnt_serves_the_attacker():
    z, _ = planted("none")
    bit = (z[:, :5].sign().prod(1) > 0).long()
    cloud, before = Knowing(), z.clone()
    weights = [p.detach().clone() for p in cloud.parameters()]
    found = infer(prepare(*parts(z), "standard", cloud), parts(bit), 2)
    assert found.winner == "unprepared tail"
    assert (found.scores.argmax(1) == parts(bit)[2]).double().mean() > 0.95
    others = [v for name, v in found.validation.items() if name != found.winner]
    assert max(others) < 0.8
    assert torch.equal(z, before)
    assert all(torch.equal(a, b) for a, b in zip(weights, cloud.parameters(), strict=True))
    again = infer(prepare(*parts(z), "standard", cloud), parts(bit), 2, 0, found.winner)
    assert torch.equal(found.scores, again.scores)


def test_a_tail_of_one_layer_is_no_attacker_of_its_own():
    z = torch.randn(8, 20)
    assert repurposed(nn.Sequential(nn.Flatten(), nn.Linear(20, 2)), z, 3) is None
    assert repurposed(nn.Sequential(nn.Linear(20, 4), nn.Linear(4, 2), nn.ReLU()), z, 3) is None
    assert prepare(*parts(planted("none")[0]), "quick", Knowing()).tail is None


def test_constant_uploads_leave_the_prior():
    z = torch.ones(sum(SIZES), 5)
    bit = torch.arange(sum(SIZES)) % 3 // 2
    found = infer(prepare(*parts(z), "standard"), parts(bit), 2)
    assert (found.scores.argmax(1) == 0).all()


@pytest.mark.slow
def test_the_attack_is_reproducible():
    first, second = accuracy("xor", "quick")[1], accuracy("xor", "quick")[1]
    assert torch.equal(first.scores, second.scores)


def test_preparations_are_fitted_on_training_uploads_alone():
    z = torch.randn(200, 5) * torch.tensor([1.0, 10.0, 1e-3, 1.0, 0.0])
    for fit in (standardize, whiten, rank):
        fitted = fit(z)
        assert torch.equal(fitted(z[:10]), fitted(z)[:10])
        assert fitted(z).shape == (200, 4)
    white = whiten(z)(z)
    torch.testing.assert_close(torch.cov(white.T), torch.eye(4), atol=1e-4, rtol=0)


def test_an_unknown_suite():
    with pytest.raises(ConfigError, match="standard, quick"):
        prepare(*parts(planted("none")[0]), "strong")


def test_constant_uploads_are_reconstructed_as_the_mean_image():
    images = torch.rand(80, 1, 8, 8)
    z, answers = torch.ones(80, 5), torch.zeros(80, dtype=torch.long)
    parts = [(z[:60], images[:60]), (z[50:60], images[50:60]), (z[60:], images[60:])]
    found = reconstruct(*parts, (answers[:60], answers[60:]), steps=5, losses=("squared error",))
    assert found.best.psnr == pytest.approx(found.mean_image.psnr)


@pytest.mark.slow
def test_the_controls_repeat_whatever_won():
    torch.manual_seed(0)
    z = torch.randn(120, 2, 8, 8)
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    cloud = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), *pool, nn.Linear(4, 2)).eval()
    labels = (torch.arange(60) % 2, torch.arange(30) % 2, torch.arange(30) % 2)
    uploads = prepare(z[:60], z[60:90], z[90:], "standard", cloud)
    tried = infer(uploads, labels, 2).validation
    assert "unprepared tail" in tried
    for winner in tried:
        half, _ = controls(uploads, labels, 2, 0, winner)
        assert 0 <= half <= 1


def pictures(count, seed=0):
    """Smooth images, so that total variation is a fair prior."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 3, 3, generator=generator)
    return nn.functional.interpolate(coarse, (12, 12), mode="bilinear").clamp(0, 1)


@pytest.mark.parametrize("channel", [None, Channel(Quantizer(8))])
def test_the_search_inverts_an_edge_that_scales_directions_down(channel):
    generator = torch.Generator().manual_seed(0)
    turn, _ = torch.linalg.qr(torch.randn(144, 144, generator=generator))
    weak = turn * torch.logspace(0, -1 if channel else -4, 144)[:, None]

    def edge(x):
        z = x.flatten(1) @ weak.T
        return z if channel is None else channel(z)

    images = pictures(400)
    if channel is not None:
        channel.steps[0].fit(images.flatten(1) @ weak.T)
    z, answers = edge(images), torch.zeros(400, dtype=torch.long)
    pairs = [(z[a:b], images[a:b]) for a, b in ((0, 300), (300, 350), (350, 400))]
    found = reconstruct(
        *pairs, (answers[:300], answers[350:]), edge=edge, steps=1, losses=("squared error",)
    )
    floor = similarity(images[:300].mean(0, keepdim=True).expand(16, -1, -1, -1), images[350:366])
    assert found.search.psnr > floor.psnr + 3
    assert found.search.ssim > floor.ssim + 0.1


@pytest.mark.parametrize(
    "loss",
    [
        "structure",
        pytest.param("squared error", marks=pytest.mark.slow),
        pytest.param("absolute error", marks=pytest.mark.slow),
    ],
)
def test_every_decoder_learns_and_retrieves(loss):
    images = pictures(500)
    z, answers = images.flatten(1), torch.zeros(500, dtype=torch.long)
    pairs = [(z[a:b], images[a:b]) for a, b in ((0, 400), (400, 450), (450, 500))]
    found = reconstruct(*pairs, (answers[:400], answers[450:]), steps=150, losses=(loss,))
    assert found.best.psnr > found.mean_image.psnr + 2
    assert found.retrieval[1] == found.linkage > 3 * found.chance
    assert found.retrieval[1] <= found.retrieval[5] <= found.retrieval[10]


def test_ssim_and_psnr_against_known_values():
    x = torch.full((1, 1, 16, 16), 0.5)
    found = similarity(x + 0.1, x)
    assert found.psnr == pytest.approx(20.0, abs=1e-4)
    # Constant images: only the luminance term is left, (2ab + c) / (a^2 + b^2 + c), c = 0.01^2.
    assert found.ssim == pytest.approx((2 * 0.5 * 0.6 + 1e-4) / (0.25 + 0.36 + 1e-4), abs=1e-4)


def test_a_leak_in_the_first_token_is_read():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(900, 50, 48, generator=generator)
    s = torch.randint(2, (900,), generator=generator)
    z[:, 0, 3] *= 1e-4
    z[:, 0, 3] += 3e-4 * s
    parts = z[:600], z[600:750], z[750:]
    uploads = prepare(*parts, "standard")
    assert any("first token" in part[0].name for part in uploads.parts)
    assert any(part[0].spatial for part in uploads.parts)
    labels = s[:600], s[600:750], s[750:]
    read = infer(uploads, labels, 2, only="first token, standardized ridge")
    assert float((read.scores.argmax(1) == s[750:]).double().mean()) > 0.85


@pytest.mark.slow
def test_bits_of_an_attacker_that_is_right_but_too_sure():
    z, s = planted("linear")
    found = infer(prepare(*parts(z), "standard"), parts(s), 2)
    truth = parts(s)[2]
    right = float((found.scores.argmax(1) == truth).double().mean())
    assert right > 0.7
    assert metrics(found.scores, truth, probable=found.probable).bits > 0.05
    sure = 50 * found.scores
    assert metrics(sure, truth).bits < 0
    prior = torch.tensor([0.5, 0.5])
    again = calibrated(sure, sure, truth, prior)
    assert metrics(sure, truth, probable=again).bits > 0.05


def test_constant_channels_do_not_blind_a_decoder():
    """Closed channels hold a constant, of which rounding leaves next to nothing to divide by."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(300, 1, 8, 8, generator=generator).round()
    images = F.interpolate(images[:, :, ::4, ::4], size=(8, 8))
    z = torch.cat([images, torch.full((300, 3, 8, 8), 0.1234567)], 1) @ torch.eye(8)
    z[:, 1:] = (z[:, 1:] * 3.0) / 3.0
    answers = torch.zeros(300, dtype=torch.long)
    parts = [(z[a:b], images[a:b]) for a, b in ((0, 200), (200, 250), (250, 300))]
    found = reconstruct(*parts, (answers[:200], answers[250:]), steps=60, losses=["squared error"])
    assert found.best.psnr > found.mean_image.psnr + 6


@pytest.mark.slow
def test_decoders_keep_their_best_moment_and_least_squares_needs_no_training(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(260, 1, 1, 1, generator=generator).expand(-1, 1, 16, 16)
    images = (images + 0.05 * torch.rand(260, 1, 16, 16, generator=generator)).clamp(0, 1)
    noise = torch.randn(260, 40, generator=generator)
    telling = torch.cat([images.mean((1, 2, 3))[:, None], noise], 1)
    answers = torch.zeros(60, dtype=torch.long), torch.zeros(100, dtype=torch.long)

    def attack(z, looks):
        monkeypatch.setattr(decoders, "LOOKS", looks)
        parts = [(z[a:b], images[a:b]) for a, b in ((0, 60), (60, 160), (160, 260))]
        return reconstruct(*parts, answers, steps=200, losses=["squared error"])

    last, best = (attack(noise, looks).decoders["squared error"].psnr for looks in (1, 10))
    assert best > last + 1
    found = attack(telling, 10)
    assert found.decoders["least squares"].psnr > found.mean_image.psnr + 3


def test_the_search_is_held_against_the_floor_of_its_own_images():
    images = torch.rand(120, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images[80:] = images[80:] * torch.linspace(0, 1, 40)[:, None, None, None]  # ever more usual
    z = torch.randn(120, 4, generator=torch.Generator().manual_seed(1))
    answers = torch.zeros(60, dtype=torch.long), torch.zeros(40, dtype=torch.long)
    parts = [(z[a:b], images[a:b]) for a, b in ((0, 60), (60, 80), (80, 120))]
    found = reconstruct(
        *parts, answers, edge=lambda x: x.flatten(1)[:, :4], steps=5, losses=["squared error"]
    )
    assert found.search_floor is not None
    gain = found.search.psnr - found.search_floor.psnr
    assert found.best.psnr >= found.mean_image.psnr + gain
    old = dataclasses.replace(found, search_floor=None)
    assert old.floor_of_search == old.mean_image


def test_uploads_of_more_values_than_samples_are_attacked_by_their_samples():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 3000, generator=generator)
    turned = whiten(x)(x)
    assert turned.shape == (80, 79)
    torch.testing.assert_close(turned.T @ turned / 79, torch.eye(79), atol=1e-3, rtol=0)
    target = torch.randn(80, 2, generator=generator).double()
    for width in (60, 200):  # the same by either way: what a linear solver gives
        part = with_one(x[:, :width])
        for penalty, weight in zip(PENALTIES, least_squares(x[:, :width], target), strict=True):
            product = part.T @ part
            shift = penalty * product.diagonal().mean() * torch.eye(width + 1).double()
            wanted = torch.linalg.solve(product + shift, part.T @ target)
            torch.testing.assert_close(weight, wanted, rtol=1e-4, atol=1e-6)


def test_a_class_that_half_of_the_training_data_lacks():
    """Persons come one after the other; trees are the attacker."""
    generator = torch.Generator().manual_seed(0)
    z, s = torch.randn(600, 6, generator=generator), (torch.arange(600) % 200 >= 160).long()
    z[:, 0] += 4 * s
    uploads, labels = prepare(*z.split(200), "standard"), s.split(200)
    half, permuted = controls(uploads, labels, 2, 0, "standardized boosting")
    assert half > 0.9 > permuted


def test_trees_of_one_class_name_it():
    x, y = torch.randn(40, 3), torch.ones(40, dtype=torch.long)
    found = boosting(Sample(x, y, x, y, 3), 0).classify(x)
    assert (found.argmax(1) == 1).all()


def test_perfect_order_does_not_end_the_search_for_a_rare_attribute():
    """Least squares orders the images perfectly, and says of few that they have the attribute."""

    def heavy(count, seed):
        s = (torch.arange(count) % 10 == 0).long()
        u = torch.rand(count, generator=torch.Generator().manual_seed(seed))
        return torch.where(s == 1, 3 + (5 * u).exp(), 2.9 * u)[:, None], s

    (train, s), (choosing, chosen), (test, truth) = heavy(400, 0), heavy(200, 1), heavy(300, 2)
    found = infer(prepare(train, choosing, test, "standard"), (s, chosen, truth), 2)
    assert found.validation["raw ridge"] == 1.0
    assert float((found.scores.argmax(1) == truth).double().mean()) > 0.98


def test_the_callers_mode_and_default_dtype_may_be_any():
    z, bit = planted("linear")
    data = prifu.AuditData(z[:400], {"task": torch.arange(400) % 2, "bit": bit[:400]})
    halves = data.at(torch.arange(250)), data.at(torch.arange(250, 400))
    settings = {"task": "task", "attributes": ["bit"], "suite": "quick", "reconstruct": False}
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            found = prifu.audit(nn.Flatten().eval(), *halves, seeds=1, **settings)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.attributes[0].accuracy.value > 0.7
    assert any("mlp" in name for name in found.attributes[0].tried)
