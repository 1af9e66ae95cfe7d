import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

import prifu_plugin as prifu
from prifu_plugin.prune.border import border_map


@settings(max_examples=150, deadline=None)
@given(
    size=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.integers(1, 3),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.integers(1, 2),
)
def test_the_map_is_the_response_to_ones(size, kernel, stride, padding, dilation):
    reach = [(k - 1) * dilation + 1 for k in kernel]
    if any(s + 2 * p < r for s, p, r in zip(size, padding, reach, strict=True)):
        return
    conv = nn.Conv2d(1, 3, kernel, stride, padding, dilation, bias=False).double()
    x = torch.ones(2, 1, *size, dtype=torch.float64)
    expected = conv(x)[:1]
    graph = fx.Graph()
    nodes = [graph.placeholder(name) for name in ("x", "result", "weight")]
    graph.output(border_map(graph, conv, *nodes))
    found = fx.GraphModule({}, graph)(x, conv(x), conv.weight)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (1, 3, 2, 1), (3, 3, 9, 9), (1, 3, 6, 31)])
def test_constants_through_padding_at_any_resolution(shape):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 5, 2, 2, groups=2))
    model = prifu.wrap(net, bias=True).double().eval()
    unit = prifu.filters(model)["1"]
    unit.weight.data[[0, 3, 5]] = 0.0
    unit.bias.data.normal_()
    pruned = prifu.prune(model, torch.zeros(2, 3, 9, 8))
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(pruned(x), model(x), rtol=1e-11, atol=1e-12)
