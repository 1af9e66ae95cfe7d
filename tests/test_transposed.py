"""Transposed convolutions are sliced like others."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from probe import least_share, macs
from test_prune_kinds import check, half_off
from torch import nn

import prifu_plugin as prifu
from prifu_plugin.prune.transposed import rows_of_outputs


class Decoder(nn.Module):
    """A norm before and behind a transposed convolution."""

    def __init__(self, transposed, norm):
        super().__init__()
        inner, outer = transposed.in_channels, transposed.out_channels
        convolution = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[transposed.weight.ndim]
        self.first, self.before = convolution(3, inner, 1), norm(inner)
        self.transposed, self.behind = transposed, norm(outer)
        self.last = convolution(outer, 2, 1)

    def forward(self, x):
        return self.last(self.behind(self.transposed(self.before(self.first(x)).relu())))


NORMS = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d]
LAYERS = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]


SETTINGS = given(
    dims=st.sampled_from([1, 2, 2, 3]),
    groups=st.sampled_from([1, 1, 2, 4]),
    per=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    padded=st.booleans(),
    bias=st.booleans(),
)


def exact(dims, groups, per, kernel, stride, dilation, padded, bias):
    torch.manual_seed(0)
    layer = LAYERS[dims - 1](
        groups * per[0], groups * per[1], kernel, stride, int(padded and kernel == 3),
        stride - 1, groups, bias, max(dilation, 1) if stride > 1 else 1,
    )  # fmt: skip
    check(Decoder(layer, NORMS[dims - 1]), (2, 3, *[4] * dims))


test_some_settings = settings(max_examples=8, deadline=None)(SETTINGS(exact))
test_many_settings = pytest.mark.slow(settings(max_examples=15, deadline=None)(SETTINGS(exact)))


@pytest.mark.parametrize("groups", [1, 8], ids=["dense", "depthwise"])
def test_what_can_be_saved_is_saved(groups):
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(8, 8, 4, 2, 1, groups=groups)
    model = half_off(prifu.wrap(Decoder(layer, nn.BatchNorm2d).double()), seed=1)
    pruned = prifu.prune(model, (torch.zeros(2, 3, 6, 6),))
    shape = (4, 3, 6, 6)
    possible = least_share(model, shape[1:])
    assert macs(pruned, shape) / macs(model, shape) == pytest.approx(possible, abs=1e-6)


def test_functional_calls():
    class Net(Decoder):
        def forward(self, x):
            at = self.transposed
            x = self.before(self.first(x)).relu()
            x = F.conv_transpose2d(x, at.weight, at.bias, 2, 1, output_padding=1, groups=2)
            return self.last(self.behind(x))

    net = Net(nn.ConvTranspose2d(8, 6, 3, 2, 1, 1, groups=2), nn.BatchNorm2d)
    check(net, (2, 3, 5, 5))
    pruned = prifu.prune(half_off(prifu.wrap(net)), (torch.zeros(2, 3, 5, 5),))
    assert not prifu.report(pruned).notes


def test_padding_of_the_output_is_no_point():
    layer = nn.ConvTranspose2d(8, 6, 1, dilation=2, output_padding=1)
    check(Decoder(layer, nn.BatchNorm2d), (2, 3, 6, 6))


def test_a_given_size_keeps_everything():
    class Net(Decoder):
        def forward(self, x):
            x = self.before(self.first(x)).relu()
            return self.last(self.behind(self.transposed(x, output_size=(12, 12))))

    net = Net(nn.ConvTranspose2d(8, 6, 3, 2, 1), nn.BatchNorm2d)
    check(net, (2, 3, 6, 6))


def test_rows_come_from_an_independent_loop():
    layer = nn.ConvTranspose2d(6, 4, 3, groups=2)
    rows = rows_of_outputs(layer)
    for out in range(4):
        for local in range(3):
            assert torch.equal(rows[out, local], layer.weight[out // 2 * 3 + local, out % 2])
