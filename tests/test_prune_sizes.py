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
