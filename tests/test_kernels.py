"""Slices of linear maps, against loops over every number."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prifu_plugin.prune.kernels import slice_linear
from prifu_plugin.prune.layout import FILL
from prifu_plugin.prune.plan import SliceLinear


@st.composite
def slices(draw):
    """A grouped convolution, and which rows and columns of which groups are to stay."""
    groups, per_out, per_in = (draw(st.integers(1, 4)) for _ in range(3))
    kept = draw(st.lists(st.integers(0, groups - 1), min_size=1, unique=True))
    height, width = draw(st.integers(1, per_out)), draw(st.integers(1, per_in))
    rows, columns = [], []
    for group in kept:
        own = draw(st.permutations(range(per_out)))[:height]
        absent = draw(st.integers(0, height - 1))
        rows += [group * per_out + row for row in own[absent:]] + [FILL] * absent
        read = draw(st.permutations(range(per_in)))[:width]
        absent = draw(st.integers(0, width))
        columns.append(tuple(read[absent:] + [FILL] * absent))
    taps = draw(st.sampled_from([(), (1,), (3,), (2, 3), (1, 2, 2)]))
    return groups, per_out, per_in, taps, SliceLinear(tuple(rows), tuple(columns), len(kept))


@settings(max_examples=150, deadline=None)
@given(slices())
def test_rows_and_columns_of_groups(case):
    groups, per_out, per_in, taps, kernel = case
    if taps:
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(taps) - 1]
        layer = kind(groups * per_in, groups * per_out, taps, groups=groups)
    elif groups > 1:
        return  # nn.Linear has none
    else:
        layer = nn.Linear(per_in, per_out)
    sliced = slice_linear(layer, kernel, None, None)
    assert sliced.weight.data_ptr() != layer.weight.data_ptr()  # also of what is whole
    assert sliced.bias.data_ptr() != layer.bias.data_ptr()
    height = len(kernel.rows) // kernel.groups
    for at, row in enumerate(kernel.rows):
        for place, column in enumerate(kernel.columns[at // height]):
            absent = FILL in (row, column)
            expected = torch.zeros(taps) if absent else layer.weight[row, column]
            assert torch.equal(sliced.weight[at, place], expected)
        expected = torch.zeros(()) if row == FILL else layer.bias[row]
        assert torch.equal(sliced.bias[at], expected)
    assert sliced.weight.shape[:2] == (len(kernel.rows), len(kernel.columns[0]))
    assert getattr(sliced, "groups", 1) == kernel.groups


def test_what_is_absent_is_zero_where_the_weights_are_not_finite():
    layer = nn.Linear(3, 4)
    layer.weight.data[0, 0] = float("inf")
    sliced = slice_linear(layer, SliceLinear((2, FILL), ((1, FILL),), 1), None, None)
    assert torch.equal(sliced.weight[1], torch.zeros(2))
    assert sliced.weight[0, 1] == 0
