"""Warps read each channel at the places of a grid; a tensor of another's type is itself."""

import pytest
import torch
import torch.nn.functional as F
from test_prune_kinds import half_off
from torch import nn

import prifu_plugin as prifu
from prifu_plugin.prune.verify import difference


class Warped(nn.Module):
    """Features, places computed from other features, and what is done with both."""

    def __init__(self, how):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        if how in COMPUTED:
            self.places = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1))
        self.last = nn.Conv2d(8, 4, 3)
        self.how = how
        self.register_buffer("turn", torch.tensor([[[0.9, 0.2, 0.1], [-0.2, 1.1, 0.0]]]))

    def forward(self, x):
        return self.last(self.how(self, self.features(x), x))


def of_the_groups(net, y, x):
    grid = F.affine_grid(net.turn.expand(x.shape[0], -1, -1), x.shape, align_corners=False)
    return F.grid_sample(F.avg_pool2d(y + 1, 3, 1, 1), grid, align_corners=False)


def by_features(net, y, x):
    grid = net.places(x).movedim(1, -1)
    return F.grid_sample(y, grid, align_corners=False)


def by_a_turn(net, y, x):
    turn = net.turn.expand(x.shape[0], -1, -1)
    grid = F.affine_grid(turn, (x.shape[0], 1, x.shape[2], x.shape[3]), align_corners=False)
    return F.grid_sample(y + 1, grid, "nearest", "border", False)


def twice(net, y, x):
    grid = net.places(x).movedim(1, -1).tanh()
    first = F.grid_sample(input=y, grid=grid, padding_mode="reflection", align_corners=True)
    return F.grid_sample(first, grid, align_corners=True)


def where_it_is(net, y, x):
    grid = net.places(x).movedim(1, -1).tanh()
    inside = F.grid_sample(torch.ones_like(y), grid, align_corners=True)
    return F.grid_sample(y + 1, grid, align_corners=True) * (inside > 0.999)


COMPUTED = [by_features, twice, where_it_is]


@pytest.mark.parametrize("dead", [(), ("features.1",), ("places.1",), ("features.1", "places.1")])
@pytest.mark.parametrize("how", [*COMPUTED, by_a_turn, of_the_groups])
def test_channels_go_through_a_warp(how, dead):
    torch.manual_seed(0)
    wrapped = half_off(prifu.wrap(Warped(how), bias=True))
    for path in dead:
        if path in prifu.filters(wrapped):
            prifu.filters(wrapped)[path].weight.data.zero_()
    pruned = prifu.prune(wrapped, torch.randn(2, 3, 9, 12))
    for shape in ((2, 3, 9, 12), (3, 3, 14, 10)):
        x = torch.randn(shape)
        assert difference(wrapped(x), pruned(x)) < 1e-5
    if not dead:
        assert not any("no rule" in reason for _, reason in prifu.report(pruned).notes)
        assert pruned.get_submodule("features.0").out_channels < 8


KINDS = {
    "type_as": lambda y, x: y.type_as(x),
    "to": lambda y, x: y.to(x),
    "type_as of the pooled": lambda y, x: y.mean((2, 3), keepdim=True).type_as(x) + y,
    "to the type": lambda y, x: y.to(x.dtype),
    "to the type of both": lambda y, x: y.to(torch.result_type(y, x)),
}


@pytest.mark.parametrize("closed", [4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_in_the_type_of_another_is_itself(kind, closed):
    torch.manual_seed(0)
    wrapped = prifu.wrap(Warped(lambda net, y, x: KINDS[kind](y, x))).eval()
    prifu.filters(wrapped)["features.1"].weight.data[:closed] = 0.0
    pruned = prifu.prune(wrapped, torch.randn(2, 3, 9, 12))
    for shape in ((2, 3, 9, 12), (3, 3, 14, 10)):
        x = torch.randn(shape)
        assert difference(wrapped(x), pruned(x)) < 1e-5
    if "both" not in kind:  # whose values torch.result_type is given
        assert pruned.get_submodule("features.0").out_channels == max(8 - closed, 1)


WITHOUT_BATCH = {
    "avg_pool3d": lambda y: F.avg_pool3d(y, 2),
    "avg_pool3d, padded": lambda y: F.avg_pool3d(y, 3, 1, 1),
    "max_pool3d": lambda y: F.max_pool3d(y, 2),
    "max_pool3d, padded": lambda y: F.max_pool3d(y, 3, 1, 1),
    "avg_pool2d": lambda y: F.avg_pool2d(y.flatten(2), 2),
    "avg_pool1d": lambda y: F.avg_pool1d(y.mean((2, 3)), 2),
    "AdaptiveAvgPool3d": nn.AdaptiveAvgPool3d((4, 3, 3)),
    "AvgPool3d": nn.AvgPool3d(3, 1, 1),
}


@pytest.mark.parametrize("pool", WITHOUT_BATCH)
def test_a_pool_that_takes_the_batch_for_channels_pools_over_channels(pool):
    torch.manual_seed(0)
    net = Warped(lambda net, y, x: net.pool(y))
    net.pool, net.last = WITHOUT_BATCH[pool], nn.Identity()
    wrapped = half_off(prifu.wrap(net), seed=1)
    pruned = prifu.prune(wrapped, torch.randn(2, 3, 9, 12))
    for shape in ((2, 3, 9, 12), (3, 3, 14, 10)):
        x = torch.randn(shape)
        assert difference(wrapped(x), pruned(x)) < 1e-5
    assert prifu.report(pruned).way == "graph"


POOLS = {
    "avg_pool1d": lambda y: F.avg_pool1d(y.flatten(2), 3).unsqueeze(-1),
    "avg_pool1d, padded": lambda y: F.avg_pool1d((y + 1).flatten(2), 3, padding=1).unsqueeze(-1),
    "avg_pool3d": lambda y: F.avg_pool3d(y.unsqueeze(-1), (2, 2, 1)).squeeze(-1),
}


@pytest.mark.parametrize("pool", POOLS)
def test_pools(pool):
    torch.manual_seed(0)
    net = Warped(lambda net, y, x: POOLS[pool](y))
    net.last = nn.Conv2d(8, 4, 1)
    wrapped = half_off(prifu.wrap(net))
    pruned = prifu.prune(wrapped, torch.randn(2, 3, 9, 12))
    for shape in ((2, 3, 9, 12), (3, 3, 14, 10)):
        x = torch.randn(shape)
        assert difference(wrapped(x), pruned(x)) < 1e-5
    assert not prifu.report(pruned).notes
    assert pruned.get_submodule("features.0").out_channels < 8


class OnePlaceByPlace(nn.Module):
    """Takes one size only, since a linear map runs over places, and pools what it gives."""

    def __init__(self, pool):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.places = nn.Linear(64, 64)
        self.last = nn.Conv2d(8, 4, 1)
        self.pool = pool

    def forward(self, x):
        y = self.features(x)
        mixed = self.places(y.flatten(2)).unflatten(2, (8, 8))
        return self.last(self.pool(torch.relu(y + mixed)))


PLACE_POOLS = [
    nn.AdaptiveAvgPool2d(1),
    nn.MaxPool2d(2),
    nn.AvgPool2d(3, 2, 1),
    nn.Upsample(scale_factor=2),
    nn.AdaptiveMaxPool2d(3),
]


@pytest.mark.parametrize("closed", [5, 8])
@pytest.mark.parametrize("pool", PLACE_POOLS)
def test_pools_of_places_that_are_known_one_by_one(pool, closed):
    torch.manual_seed(0)
    wrapped = prifu.wrap(OnePlaceByPlace(pool), bias=True).eval()
    unit = prifu.filters(wrapped)["features.1"]
    unit.weight.data[:closed] = 0.0
    unit.bias.data.normal_()
    pruned = prifu.prune(wrapped, torch.randn(2, 3, 8, 8))
    x = torch.randn(3, 3, 8, 8)
    assert difference(wrapped(x), pruned(x)) < 1e-5
    assert not any("no rule" in reason for _, reason in prifu.report(pruned).notes)
    assert pruned.get_submodule("features.0").out_channels == max(8 - closed, 1)
