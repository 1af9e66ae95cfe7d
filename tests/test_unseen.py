"""Sizes that no run has changed: followed if they can be changed, else under a guard."""

import pytest
import torch
import torch.nn.functional as F
from test_sized import answer
from torch import nn

import prifu_plugin as prifu
from prifu_plugin.prune.verify import difference


class Tokens(nn.Module):
    """Takes indices of tokens, (N, L)."""

    def __init__(self, body):
        super().__init__()
        self.embed, self.norm, self.last = nn.Embedding(20, 8), nn.LayerNorm(8), nn.Linear(8, 4)
        self.places = nn.Parameter(torch.cat([torch.zeros(8, 8), torch.randn(24, 8)]))
        self.body = body

    def forward(self, tokens):
        return self.body(self, self.norm(self.embed(tokens)))


TOKENS = {
    "padded": lambda self, y: self.last(F.pad(y, (0, 0, 0, 16 - y.shape[1]))),
    "places": lambda self, y: self.last(y * self.places[: y.shape[1]]),
    "turned": lambda self, y: self.last(y.transpose(1, 2).reshape(y.shape[0], y.shape[1], 8)),
    "cut": lambda self, y: y[:, :, : y.shape[1]].sum(2),
}


def closed(net, channels=slice(0, 3), bias=False):
    torch.manual_seed(0)
    model = prifu.wrap(net.eval(), bias=bias).eval()
    for unit in prifu.filters(model).values():
        unit.weight.data[channels] = 0.0
    return model


def check(model, example, *others):
    pruned = prifu.prune(model, example)
    assert not isinstance(answer_of(pruned, example), str)
    for x in others:
        found = answer_of(pruned, x)
        assert isinstance(found, str) or difference(answer_of(model, x), found) <= 1e-5


def answer_of(model, x):
    return answer(lambda given: model(*given), x if isinstance(x, tuple) else (x,))


@pytest.mark.parametrize("length", [8, 16])
@pytest.mark.parametrize("body", TOKENS.values(), ids=list(TOKENS))
def test_lengths_of_tokens(body, length):
    def tokens(n):
        return torch.randint(0, 20, (2, n))

    check(closed(Tokens(body)), tokens(length), *map(tokens, (3, 8, 9, 16)))


def test_lengths_of_tokens_are_followed():
    pruned = prifu.prune(closed(Tokens(lambda self, y: self.last(y))), torch.ones(2, 8).long())
    assert pruned(torch.ones(2, 13).long()).shape == (2, 13, 4)


class Images(nn.Module):
    """Convolution, norm, and what is made of them."""

    def __init__(self, body):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 4, 1)
        self.body = body

    def features(self, x):
        return self.norm(self.first(x))

    def forward(self, *x):
        return self.body(self, *x)


def of_clips(self, x):
    b, t = x.shape[:2]
    y = self.features(x.flatten(0, 1)).mean((2, 3)).unflatten(0, (b, t))
    return y[:, :, :t].cumsum(2)[:, :, -1]


def of_two(self, x, z):
    return self.features(x)[:, : z.shape[1]].sum(1)


def by_height(self, x):
    return self.features(x)[:, : min(8, x.shape[2] // 4)].sum(1)


def by_height_below(self, x):
    y = self.features(x)
    if x.shape[2] < 32:
        y = y[:, : x.shape[2] // 4]
    return y.mean(1)


def channels_last(self, x):
    y = self.features(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return F.pad(y, (0, 0, 0, 16 - x.shape[2]))


SIZES = {
    of_clips: ((2, 4, 3, 8, 8), (2, 8, 3, 8, 8), (2, 3, 3, 8, 8), (1, 4, 3, 12, 9)),
    by_height: ((2, 3, 16, 16), (2, 3, 12, 12), (2, 3, 24, 24), (2, 3, 16, 40)),
    by_height_below: ((2, 3, 16, 16), (2, 3, 12, 12), (2, 3, 24, 24), (2, 3, 40, 40)),
    channels_last: ((2, 16, 16, 3), (2, 16, 12, 3), (2, 9, 16, 3)),
}


@pytest.mark.parametrize("body", SIZES, ids=lambda body: body.__name__)
def test_sizes_of_images(body):
    example, *others = (torch.randn(shape) for shape in SIZES[body])
    check(closed(Images(body)), example, *others)


def test_sizes_of_a_second_input():
    x = torch.randn(2, 3, 8, 8)
    check(closed(Images(of_two)), (x, torch.randn(2, 5)), (x, torch.randn(2, 8)))


@pytest.mark.parametrize("band", [100, 700])
def test_bands_that_only_large_images_have(band):
    model = closed(Images(lambda self, x: self.last(self.features(x).tril(band))), bias=True)
    for unit in prifu.filters(model).values():
        nn.init.normal_(unit.bias)
    others = [torch.randn(1, 3, size, size + 20) for size in (40, band + 20)]
    check(model, torch.randn(2, 3, 16, 16), *others)


class Bags(nn.Module):
    """Takes bags of images (N, T, C, H, W) and a weight for each image, (N, T)."""

    def __init__(self, body):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.linear, self.of_each, self.last = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.body = body

    def forward(self, x, weights):
        n, length = x.shape[:2]
        y = self.norm(self.conv(x.flatten(0, 1))).relu().mean((2, 3)).view(n, length, 8)
        each = self.of_each(self.linear(y))
        return self.last(self.body(each)) + (y * weights[..., None]).sum((1, 2))[:, None]


BAGS = {
    "flat": lambda y: y.flatten(1)[:, 16:24],
    "turned": lambda y: y.transpose(1, 2).reshape(y.shape[0], -1, 8).mean(1),
    "pooled": lambda y: F.adaptive_avg_pool1d(y.flatten(1)[:, None], 8)[:, 0],
    "summed": lambda y: y.sum(1),
}


@pytest.mark.parametrize("body", BAGS.values(), ids=list(BAGS))
def test_lengths_that_two_inputs_share(body):
    def bags(n, length, size=16):
        return torch.randn(n, length, 3, size, size), torch.randn(n, length)

    model = closed(Bags(body))
    check(model, bags(2, 4), bags(3, 4), bags(2, 6), bags(2, 8), bags(1, 5, 20))
    if body is BAGS["summed"]:  # which holds for all
        assert not isinstance(answer_of(prifu.prune(model, bags(2, 4)), bags(2, 7)), str)


class Split(nn.Module):
    """Convolves a part of many channels, as FasterNet and MixNet do."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 192, 1), nn.BatchNorm2d(192)
        self.part, self.last = nn.Conv2d(48, 48, 3, padding=1), nn.Conv2d(192, 4, 1)

    def forward(self, x):
        y = self.norm(self.conv(x))
        first, second = torch.split(y, [48, 144], 1)
        return self.last(torch.cat([self.part(first), second], 1))


def test_a_split_of_many_channels_copies_nothing():
    model = closed(Split(), torch.arange(192) % 2 == 0)
    pruned = prifu.prune(model, torch.randn(2, 3, 12, 12))
    assert pruned.get_submodule("last").in_channels == 48 + 72
    assert not [node for node in pruned.graph.nodes if node.target is torch.index_select]
    check(model, torch.randn(2, 3, 12, 12), torch.randn(1, 3, 9, 20), torch.randn(2, 3, 200, 210))
