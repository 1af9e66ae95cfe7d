"""Where channels stay because moving values is dearer; the quickest of several exact ways."""

import time

import pytest
import timm
import torch
import zoo
from torch import nn

import prifu_plugin as prifu
from prifu_plugin.errors import ConfigError
from prifu_plugin.prune.fastest import WAYS as OFFERED

WAYS = [(1, 0.0), (1, 64.0), (16, 64.0), (1, float("inf")), (16, float("inf"))]


def filtered(name, share, seed=0):
    torch.manual_seed(seed)
    wrapped = prifu.wrap(timm.create_model(name, num_classes=10)).eval()
    zoo.half_off(wrapped, seed)
    for unit in prifu.filters(wrapped).values():
        unit.weight.data.fill_(0.1)
        unit.weight.data[torch.rand(unit.weight.shape) < share] = 0.0
    return wrapped


def copies(model):
    moves = (torch.index_select, torch.nn.functional.pad)
    return sum(node.target in moves for node in model.graph.nodes)


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("test_resnet", 0.3),
        pytest.param("mobilenetv2_035", 0.1, marks=pytest.mark.slow),
        pytest.param("test_vit", 0.1, marks=[pytest.mark.slow, pytest.mark.long]),
        pytest.param("resnet18", 0.5, marks=[pytest.mark.slow, pytest.mark.long]),
        pytest.param("convnext_atto", 0.1, marks=[pytest.mark.slow, pytest.mark.long]),
        pytest.param("efficientnet_b0", 0.1, marks=[pytest.mark.slow, pytest.mark.long]),
    ],
)
def test_every_way_is_exact_and_dear_copies_are_saved(name, share):
    size = zoo.image_size(name)
    wrapped = filtered(name, share)
    found = {}
    for round_to, cost in WAYS:
        pruned = prifu.prune(wrapped, torch.zeros(1, 3, size, size), round_to=round_to,
                             move_cost=cost)  # fmt: skip
        found[round_to, cost] = copies(pruned), prifu.report(pruned).macs[1]
    assert found[1, float("inf")][0] <= found[1, 64.0][0] <= found[1, 0.0][0]
    assert found[1, float("inf")][0] <= 4
    assert found[1, 0.0][1] <= found[1, 64.0][1] <= found[1, float("inf")][1]


def test_no_copy_is_left_where_all_layers_can_take_their_channels():
    pruned = prifu.prune(filtered("test_resnet", 0.3), torch.zeros(1, 3, 64, 64), move_cost=1e9)
    assert copies(pruned) == 0
    report = prifu.report(pruned)
    assert report.macs[1] < 0.75 * report.macs[0]


def test_fastest_returns_what_it_measured_to_be_quickest():
    wrapped = filtered("test_resnet", 0.3)
    built = []

    def build(model):
        built.append(model)
        dense = "_prifu_pruned" not in vars(model)
        channels = model.get_submodule("conv1.0").out_channels
        seconds = 0.002 if dense or channels % 16 else 0.0005

        def run():
            time.sleep(seconds)

        return run

    ways = [(1, 0.0), (16, 64.0)]
    found = prifu.fastest(wrapped, torch.zeros(1, 3, 64, 64), build=build, ways=ways, rounds=5)
    assert (found.round_to, found.move_cost) == (16, 64.0)
    assert built[0] is not wrapped
    assert list(prifu.filters(built[0])) == list(prifu.filters(wrapped))
    assert len(built) == 3
    assert found.ratios[16, 64.0] < 0.6 < found.ratios[1, 0.0]
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(found.model(x), wrapped(x), rtol=1e-4, atol=1e-5)
    assert all(check.holds for check in prifu.report(found.model).checks)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit"])
def test_a_way_without_a_copy_keeps_all_channels(name):
    size = zoo.image_size(name)
    wrapped = filtered(name, 0.3)
    round_to, move_cost = OFFERED[-1]
    x = torch.zeros(1, 3, size, size)
    pruned = prifu.prune(wrapped, x, round_to=round_to, move_cost=move_cost)
    report = prifu.report(pruned)
    assert report.parameters[1] >= report.parameters[0]  # biases that hold constants come on top
    assert report.saved <= 1e-6
    assert copies(pruned) == 0


def test_fastest_runs_in_eval_mode_and_leaves_the_mode():
    model = prifu.wrap(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())).train()
    model[2].eval()
    before = model[1].running_mean.clone()
    prifu.fastest(model, torch.randn(2, 3, 8, 8), rounds=1, ways=[(1, 0.0)])
    assert [model.training, model[1].training, model[2].training] == [True, True, False]
    assert torch.equal(model[1].running_mean, before)


def test_refused():
    model = prifu.wrap(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    for cost in (-1.0, float("nan")):
        with pytest.raises(ConfigError, match="move_cost"):
            prifu.prune(model, torch.zeros(1, 3, 8, 8), move_cost=cost)
    with pytest.raises(ConfigError, match="at least one"):
        prifu.fastest(model, torch.zeros(1, 3, 8, 8), ways=[])
    for wrong in ({"round_to": "a"}, {"round_to": 2.5}, {"move_cost": None}):
        with pytest.raises(ConfigError):
            prifu.prune(model, torch.zeros(1, 3, 8, 8), **wrong)
    with pytest.raises(ConfigError, match="pair"):
        prifu.fastest(model, torch.zeros(1, 3, 8, 8), ways=[1])


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(16, affine=True), nn.GroupNorm(4, 16)])
def test_groups_that_are_closed_as_a_whole_go_whatever_a_copy_costs(norm):
    layers = nn.Conv2d(3, 16, 3, padding=1), norm, nn.ReLU(), nn.Conv2d(16, 8, 1)
    model = prifu.wrap(nn.Sequential(*layers)).eval()
    prifu.filters(model)["1"].weight.data[:8] = 0
    for cost in (0.0, 8.0, float("inf")):
        pruned = prifu.prune(model, torch.zeros(1, 3, 16, 16), move_cost=cost)
        assert copies(pruned) == 0
        assert pruned.get_submodule("3").in_channels == 8


class Quotient(nn.Module):
    """A division whose unneeded channels lead into weights of 0."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.below, self.left = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1)
        self.right = nn.Conv2d(8, 3, 1)
        with torch.no_grad():
            self.left.weight[:, [1, 5]] = 0

    def forward(self, x):
        y = self.stem(x)
        return self.left(y / (torch.sigmoid(self.below(x)) + 0.5)) + self.right(y)


def test_nothing_is_divided_by_what_was_filled_in():
    torch.manual_seed(0)
    model = prifu.wrap(Quotient()).eval()
    prifu.filters(model)["stem.1"].weight.data[[0, 3]] = 0.0
    for round_to, cost in WAYS:
        prifu.prune(model, torch.zeros(1, 3, 8, 8), round_to=round_to, move_cost=cost)
