"""What holds at one size need not hold at another: prune concludes only what two sizes share."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prifu_plugin as prifu
from prifu_plugin.prune.verify import difference

PAD = torch.cat([torch.zeros(1, 10, 8), torch.randn(1, 10, 8)], 1)


class Tokens(nn.Module):
    """Two filtered tensors a and b of (N, L, 8), and a body that depends on L."""

    def __init__(self, body):
        super().__init__()
        self.n1, self.f1, self.n2 = nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.f2 = nn.Linear(8, 8)
        self.pos = nn.Parameter(PAD.clone())
        self.body = body

    def forward(self, x):
        a = self.n1(x)
        b = self.n2(self.f1(a) + x)
        return self.f2(self.body(self, x, a, b))


class Image(nn.Module):
    """The same with (N, 8, H, W)."""

    def __init__(self, body):
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.c2, self.n2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.t, self.one = nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(1, 1, 3, padding=1)
        self.body = body

    def forward(self, x):
        a = self.n1(self.c1(x))
        b = self.n2(self.c2(a))
        return self.t(self.body(self, x, a, b))


def spread(b, *shape):
    return b.reshape(*shape, b.size(2), b.size(3))


def back(b, like):
    return b.reshape(like.shape[0], 8, like.shape[2], like.shape[3])


TOKENS = {
    "length in a formula": (10, lambda s, x, a, b: b / b.size(1)),
    "position cut to length": (10, lambda s, x, a, b: b + s.pos[:, : x.size(1)]),
    "flattened, added, restored": (
        10,
        lambda s, x, a, b: (a.flatten(1) + b.flatten(1)).view(x.size(0), -1, 8),
    ),
    "literal crop": (10, lambda s, x, a, b: b[:, :10]),
    "literal crop of the batch": (10, lambda s, x, a, b: b[:4]),
    "crop to the end": (10, lambda s, x, a, b: b + F.pad(b[:, 10:], (0, 0, 10, 0))),
    "sum at length 1": (1, lambda s, x, a, b: b.sum(1)),
    "cumulative sum at length 1": (1, lambda s, x, a, b: b.cumsum(1)),
    "flip at length 1": (1, lambda s, x, a, b: b + b.flip(1)),
    "roll by the length": (3, lambda s, x, a, b: b + b.roll(3, 1)),
    "triangle at length 1": (1, lambda s, x, a, b: b.tril()),
    "pooled to the same": (
        10,
        lambda s, x, a, b: F.adaptive_avg_pool1d(b.transpose(1, 2), 10).transpose(1, 2),
    ),
}
IMAGES = {
    "half the channels to the batch": lambda s, x, a, b: back(spread(b, -1, 4).relu(), b),
    "gates in the batch": lambda s, x, a, b: back(spread(b, -1, 2).sigmoid() * spread(a, -1, 2), b),
    "channels to the batch": lambda s, x, a, b: back(s.one(spread(b, -1, 1)), b),
    "batch and channels flat": lambda s, x, a, b: (a.flatten(0, 1) + b.flatten(0, 1)).view_as(b),
    "channels and space flat": lambda s, x, a, b: (a.flatten(1) + b.flatten(1)).view_as(b),
    "crop as large as the image": lambda s, x, a, b: b[:, :, :12, :12],
    "pooled to its own size": lambda s, x, a, b: F.adaptive_max_pool2d(b, 12),
    "channels moved and back": lambda s, x, a, b: back(spread(b, -1, 2).flip(0).flip(0), b),
}


def check(net, shape, others):
    for seed, bias in ((0, False), (1, True)):
        torch.manual_seed(seed)
        model = prifu.wrap(net, bias=bias).double().eval()
        for unit in prifu.filters(model).values():
            unit.weight.data[torch.rand(8) < 0.5] = 0.0
            if bias:
                unit.bias.data.normal_()
        pruned = prifu.prune(model, torch.zeros(shape))
        for other in others:
            x = torch.randn(other, dtype=torch.float64)
            assert difference(model(x), pruned(x)) <= 1e-11


@pytest.mark.parametrize("name", TOKENS)
def test_tokens(name):
    length, body = TOKENS[name]
    check(Tokens(body), (2, length, 8), [(n, m, 8) for n, m in ((1, length), (2, 12), (6, 16))])


@pytest.mark.parametrize("name", IMAGES)
def test_images(name):
    shapes = [(1, 3, 12, 12), (3, 3, 16, 16), (2, 3, 24, 20)]
    check(Image(IMAGES[name]), (2, 3, 12, 12), shapes)


@pytest.mark.parametrize(
    "body",
    [
        lambda s, x, a, b: b[:, None, :, :99, :99].squeeze(1),
        lambda s, x, a, b: b[None, :, :, -99:][0],
        lambda s, x, a, b: b[None, ..., :99][0],
    ],
)
def test_crops_beside_a_new_dimension_that_no_run_has_seen(body):
    check(Image(body), (2, 3, 12, 12), [(1, 3, 12, 12), (1, 3, 120, 110)])


def test_savings_survive_the_second_run():
    model = prifu.wrap(Image(lambda s, x, a, b: back(spread(b, -1, 2).flip(1).flip(1), b)))
    for unit in prifu.filters(model).values():
        unit.weight.data[:4] = 0.0
    pruned = prifu.prune(model, torch.zeros(2, 3, 12, 12))
    assert pruned.get_submodule("t").in_channels == 4


# What a movement does follows from sizes, and at both sizes that prune runs it does nothing.

REMAINDERS = {
    "crop by padding": lambda x, h, w: F.pad(x, (0, -w % 4, 0, -h % 4)),
    "crop": lambda x, h, w: x[:, :, : h // 4 * 4, : w // 4 * 4],
    "repeat": lambda x, h, w: x.repeat(1, 1, 1 + h % 4, 1),
    "tile": lambda x, h, w: x.tile((1, 1, 1 + h % 4, 1)),
    "roll channels": lambda x, h, w: x.roll(w % 4, 1),
    "roll channels by images": lambda x, h, w: x.roll(x.shape[0] // 4, 1),
    "roll": lambda x, h, w: x.roll(w % 4, 3),
    "turn": lambda x, h, w: torch.rot90(x, h % 4, (2, 3)),
    "stride": lambda x, h, w: x[:, :, :: 1 + h % 4],
    "reflect": lambda x, h, w: F.pad(x, (0, -w % 4, 0, -h % 4), mode="reflect"),
    "replicate": lambda x, h, w: F.pad(x, (0, -w % 4, 0, -h % 4), mode="replicate"),
    "add": lambda x, h, w: x + h % 4,
    "multiply": lambda x, h, w: x * (1 + h % 4),
    "what halving lost": lambda x, h, w: (
        x + F.pad(F.interpolate(F.max_pool2d(x, 2), scale_factor=2), (0, w % 2, 0, h % 2))
    ),
    "pad twice": lambda x, h, w: F.pad(F.pad(x, (0, -w % 4, 0, -h % 4)).relu(), (0, 1)),
}


class Patches(nn.Module):
    """Patches of 4 pixels: 16 and 24 of them are multiples of 4, as many other numbers are not."""

    def __init__(self, body):
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8)
        self.out = nn.Conv2d(8, 3, 3, padding=1)
        self.body = body

    def forward(self, x):
        x = self.norm(self.patch(x))
        return self.out(self.body(x, *x.shape[-2:]))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", REMAINDERS)
def test_remainders_that_both_sizes_lack(name, bias):
    torch.manual_seed(0)
    model = prifu.wrap(Patches(REMAINDERS[name]), bias=bias).double().eval()
    for unit in prifu.filters(model).values():
        unit.weight.data[::2] = 0.0
        if bias:
            unit.bias.data.normal_()
    pruned = prifu.prune(model, torch.zeros(2, 3, 64, 64))
    for shape in ((1, 3, 84, 84), (7, 3, 72, 76), (2, 3, 64, 88), (3, 3, 92, 100)):
        x = torch.randn(shape, dtype=torch.float64)
        assert difference(model(x), pruned(x)) <= 1e-11, shape
    if "channels" not in name and name != "add":
        assert pruned.get_submodule("patch").out_channels == 4


def test_what_follows_from_channels_alone_is_no_remainder():
    torch.manual_seed(0)
    halves = Patches(
        lambda x, h, w: torch.cat((x[:, x.shape[1] // 2 :], x[:, : x.shape[1] // 2]), 1)
    )
    shuffled = Patches(
        lambda x, h, w: (
            x.view(x.shape[0], 2, x.shape[1] // 2, h, w).transpose(1, 2).reshape(x.shape)
        )
    )
    for net in (halves, shuffled):
        model = prifu.wrap(net).eval()
        prifu.filters(model)["norm"].weight.data[:4] = 0.0
        pruned = prifu.prune(model, torch.zeros(2, 3, 64, 64))
        assert pruned.get_submodule("patch").out_channels == 4
        assert pruned.get_submodule("out").in_channels == 4


def test_sequences_padded_to_a_multiple():
    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.norm = nn.Conv1d(3, 8, 3, padding=1), nn.BatchNorm1d(8)
            self.out = nn.Conv1d(8, 2, 3, padding=1)

        def forward(self, x):
            x = self.norm(self.enter(x))
            return self.out(F.pad(x, (0, -x.shape[-1] % 16)))

    torch.manual_seed(0)
    model = prifu.wrap(Sequence(), bias=True).double().eval()
    unit = prifu.filters(model)["norm"]
    unit.weight.data[:4], unit.bias.data[:] = 0.0, 1.0
    pruned = prifu.prune(model, torch.zeros(2, 3, 64))
    for length in (64, 100, 17):
        x = torch.randn(2, 3, length, dtype=torch.float64)
        assert difference(model(x), pruned(x)) <= 1e-11, length
