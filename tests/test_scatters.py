"""What is written into a slice, and what is concatenated with itself, keeps no channel."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_augmented import filtered
from torch import fx

import prifu_plugin as prifu
from prifu_plugin.prune.spell_out import spell_out
from prifu_plugin.prune.verify import difference

ENDS = st.none() | st.integers(-7, 7)


def scattered(function, *rest):
    """Return a graph with one scatter, and the same without it."""
    graph = fx.Graph()
    x, source = graph.placeholder("x"), graph.placeholder("source")
    node = graph.call_function(function, (x, source, *rest))
    graph.output(node)
    before = fx.GraphModule({}, copy.deepcopy(graph))
    spell_out(graph, node)
    return before, fx.GraphModule({}, graph)


@given(st.integers(-3, 2), ENDS, ENDS, st.integers(1, 6))
def test_a_slice_is_replaced_at_any_size(dim, start, end, size):
    expected, found = scattered(torch.slice_scatter, dim, start, end)
    x = torch.arange(2.0 * 3 * size).reshape([2, 3, size] if dim in (2, -1) else [size, 2, 3])
    x = x if dim not in (1, -2) else x.movedim(0, 1)
    at = range(x.shape[dim])[start:end]
    source = -torch.ones_like(x.narrow(dim, 0, 1)).repeat_interleave(len(at), dim)
    assert torch.equal(expected(x, source), found(x, source))


@given(st.integers(-3, 2), st.integers(-2, 1))
def test_an_index_is_replaced(dim, index):
    expected, found = scattered(torch.select_scatter, dim, index)
    x = torch.arange(24.0).reshape(2, 3, 4)
    source = -torch.ones_like(x.select(dim, 0))
    assert torch.equal(expected(x, source), found(x, source))


def slice_of_channels(y, z):
    y = y * 1
    y[:, 2:5] = z[:, :3]
    return y, z


def one_channel(y, z):
    y = y * 1
    y[:, -1] = z[:, 0] * 2
    return y, z


def border(y, z):
    y = y * 1
    y[:, :, :2] = z[:, :, -2:]
    return y, z


def with_itself(y, z):
    part = y[:, :4]
    return torch.cat([part, part], 1), z


@pytest.mark.parametrize("how", [slice_of_channels, one_channel, border, with_itself])
def test_channels_go_through_what_is_put_together(how):
    wrapped = filtered(how)
    pruned = prifu.prune(wrapped, torch.randn(2, 3, 8, 8))
    for shape in ((2, 3, 8, 8), (3, 3, 12, 10)):
        x = torch.randn(shape)
        assert difference(wrapped(x), pruned(x)) < 1e-5
    assert not prifu.report(pruned).notes
