"""What pruned models go through on their way: autocast, tracing, exporters, types of weights."""

import pytest
import torch
from test_prune_kinds import half_off
from torch import nn

import prifu_plugin as prifu
from prifu_plugin.prune.verify import difference


class Recurrent(nn.Module):
    """An LSTM behind a norm, which takes all channels: constants are filled in."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.cell, self.last = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x):
        h = self.norm(self.first(x)).flatten(2).transpose(1, 2)
        return self.last(self.cell(h)[0])


class Mixing(nn.Module):
    """A product of tokens with each other, behind an activation that moves constants."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.act, self.pool, self.last = nn.GELU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        h = self.act(self.norm(self.first(x)))
        return self.last(self.pool(h).cumsum(1).flip(1))


def with_constants(net):
    torch.manual_seed(0)
    model = half_off(prifu.wrap(net, bias=True))
    for unit in prifu.filters(model).values():
        nn.init.normal_(unit.bias)
    return model


def types_of_inputs(model, names, x):
    """Return the type in which each layer gets its input, under autocast."""
    found = {}

    def note(name):
        def hook(module, args):
            found[name] = args[0].dtype

        return model.get_submodule(name).register_forward_pre_hook(hook)

    handles = [note(name) for name in names]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(
    ("net", "names"), [(Recurrent, ["cell", "last"]), (Mixing, ["pool", "last"])]
)
def test_what_is_filled_in_has_the_type_of_what_it_joins_under_autocast(net, names):
    model = with_constants(net())
    x = torch.randn(2, 3, 9, 9)
    pruned = prifu.prune(model, x)
    assert any(name.startswith("constants") for name in pruned.state_dict())
    assert types_of_inputs(pruned, names, x) == types_of_inputs(model, names, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert difference(model(x), pruned(x)) <= 0.05


def bordered():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 5, 2, 2))
    return prifu.prune(with_constants(net), torch.zeros(2, 3, 9, 8))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated")
def test_a_network_with_a_border_map_is_traced_by_torch_jit():
    pruned = bordered()
    assert any("border" in name for name in pruned.state_dict())
    x = torch.randn(2, 3, 9, 8)
    traced = torch.jit.trace(pruned, x)
    for size in ((9, 8), (6, 13), (1, 1)):
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(traced(x), pruned(x))


def test_a_network_with_a_border_map_is_exported_for_any_size():
    pruned = bordered()
    dims = {
        dim: torch.export.Dim(f"dim{dim}", min=least, max=64) for dim, least in ((2, 3), (3, 3))
    }
    program = torch.export.export(pruned, (torch.randn(2, 3, 9, 8),), dynamic_shapes=(dims,))
    for size in ((9, 8), (6, 13), (3, 3), (30, 31)):
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(program.module()(x), pruned(x))


class TwoTypes(nn.Module):
    """A body in half the width of its head."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.second, self.last = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        h = self.norm(self.first(x.to(self.first.weight.dtype)))
        return self.last(self.second(h).to(self.last.weight.dtype))


def two_types():
    net = TwoTypes()
    for part in (net.first, net.norm, net.second):
        part.bfloat16()
    return net


def test_a_model_in_two_types_is_rebuilt_from_one_in_fp32():
    torch.manual_seed(0)
    model = half_off(prifu.wrap(two_types()))
    x = torch.randn(2, 3, 9, 9)
    pruned = prifu.prune(model, x)
    again = prifu.rebuild(TwoTypes(), prifu.plan(pruned), pruned.state_dict())
    types = {name: value.dtype for name, value in pruned.state_dict().items()}
    assert {name: value.dtype for name, value in again.state_dict().items()} == types
    assert set(types.values()) >= {torch.bfloat16, torch.float32}
    assert torch.equal(again(x), pruned(x))
