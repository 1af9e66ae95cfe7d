"""Branches that masks have closed are not computed for their sizes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sized import answer
from torch import fx, nn

import prifu_plugin as prifu
from prifu_plugin.prune.asked_sizes import spare_asked
from prifu_plugin.prune.verify import difference


@st.composite
def layers(draw):
    """A layer with sizes of its own, and the number of dimensions it works along."""
    rank, kernel, stride = (draw(st.integers(1, most)) for most in (3, 4, 3))
    padding, dilation = draw(st.integers(0, kernel // 2)), draw(st.integers(1, 2))
    kind = draw(st.sampled_from(["Conv", "MaxPool", "AvgPool", "BatchNorm", "GELU"]))
    if kind == "Conv":
        made = getattr(nn, f"Conv{rank}d")(3, 5, kernel, stride, padding, dilation)
    elif kind == "MaxPool":
        made = getattr(nn, f"MaxPool{rank}d")(kernel, stride, padding, dilation)
    elif kind == "AvgPool":
        made = getattr(nn, f"AvgPool{rank}d")(kernel, stride, padding)
    else:
        made = nn.GELU() if kind == "GELU" else getattr(nn, f"BatchNorm{rank}d")(3).eval()
    return rank, made


@settings(max_examples=100, deadline=None)
@given(layers(), st.lists(st.integers(9, 14), min_size=3, max_size=3))
def test_sizes_of_results_follow_from_those_of_inputs(case, sizes):
    rank, layer = case
    graph = fx.Graph()
    made = graph.call_module("layer", (graph.placeholder("x"),))
    dims = [dim for dim in range(rank + 2) if dim != 1]
    graph.output([graph.call_method("size", (made, dim)) for dim in dims])
    spare_asked(graph, {"layer": layer})
    assert not any(node.op == "call_module" for node in graph.nodes)
    x = torch.randn(2, 3, *sizes[:rank])
    found = fx.GraphModule({}, graph)(x)
    assert found == [layer(x).shape[dim] for dim in dims]


class ClosedBranch(nn.Module):
    """Decides on the size of a branch, and resizes by it."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.inner, self.other = nn.Conv2d(8, 6, 3, 2, 1), nn.BatchNorm2d(6)
        self.gate, self.last = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        h = self.norm(self.first(x))
        inside = self.other(self.inner(h)).relu()
        gate = self.gate(inside)
        if gate.shape[2] // 2 > 1:
            h = h + F.interpolate(gate, size=h.shape[2:])
        return self.last(F.adaptive_avg_pool2d(h, 1) + gate.mean((2, 3), keepdim=True))


@pytest.mark.parametrize("size", [(16, 12), (13, 24)])
def test_what_is_closed_is_not_run_for_its_size(size):
    torch.manual_seed(0)
    model = prifu.wrap(ClosedBranch()).eval()
    prifu.filters(model)["other"].weight.data.zero_()
    pruned = prifu.prune(model, torch.zeros(2, 3, *size))
    assert not hasattr(pruned, "inner")
    for at in (size, (32, 21), (2, 2), (5, 5)):
        x = torch.randn(2, 3, *at)
        found = answer(pruned, x)
        assert isinstance(found, str) or difference(model(x), found) <= 1e-5
    assert not isinstance(answer(pruned, torch.randn(2, 3, *size)), str)
