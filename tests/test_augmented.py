"""`y += z` writes into a tensor: whoever else has a name for it, or a view of it, sees it."""

import operator

import pytest
import torch
from test_prune_kinds import half_off
from torch import nn

import prifu_plugin as prifu
from prifu_plugin.prune.verify import difference

OPERATORS = {
    "+=": operator.iadd,
    "-=": operator.isub,
    "*=": operator.imul,
    "/=": operator.itruediv,
    "//=": operator.ifloordiv,
    "**=": operator.ipow,
    "%=": operator.imod,
}


class Net(nn.Module):
    """Writes into features by an augmented assignment; `how(y, z, other)` returns two of them."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.other = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.ends = nn.ModuleList([nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)])

    def forward(self, x):
        y = self.features(x)
        first, second = self.how(y, self.other(y))
        return self.ends[0](first) * self.ends[1](second)


def second_name(y, z):
    name = y
    y += z
    return y, name


def name_of_a_sum(y, z):
    y = y + z
    name = y
    y *= 2
    return y, name


def of_a_part(y, z):
    part = y.chunk(2, 1)[0]
    name = part
    part = part + 0
    part += z[:, :4]
    return torch.cat([part, y[:, 4:]], 1), torch.cat([name, name], 1)


def into_a_view(y, z):
    view = y[:, :4]
    view += z[:, 4:]
    return y, z


def into_a_part(y, z):
    y = y * 1
    y[:, :4] += z[:, 4:]
    return y, z


def of_sizes(y, z):
    height = kept = y.shape[2]
    height += 2
    shape = y.shape
    shape += (1,)
    return y * (height - kept), z / len(shape)


FORMS = {
    f.__name__: f
    for f in (second_name, name_of_a_sum, of_a_part, into_a_view, into_a_part, of_sizes)
}


def filtered(how):
    torch.manual_seed(0)
    return half_off(prifu.wrap(Net(how).eval()))


def check(wrapped, pruned):
    for shape in ((2, 3, 8, 8), (3, 3, 12, 10)):
        x = torch.randn(shape)
        assert difference(wrapped(x.clone()), pruned(x)) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_every_name_of_a_tensor_sees_what_is_written_into_it(form):
    wrapped = filtered(FORMS[form])
    pruned = prifu.prune(wrapped, torch.randn(2, 3, 8, 8))
    check(wrapped, pruned)
    assert pruned.get_submodule("features.0").out_channels < 8


@pytest.mark.parametrize("sign", OPERATORS)
def test_every_operator_writes(sign):
    def how(y, z):
        name = y
        y = OPERATORS[sign](y, z * 0 + 2)  # what the statement does
        return y, name

    wrapped = filtered(how).double()
    pruned = prifu.prune(wrapped, torch.randn(2, 3, 8, 8, dtype=torch.float64))
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    assert difference(wrapped(x), pruned(x)) < 1e-11


def test_what_is_cut_behind_it_is_what_was_written():
    wrapped = filtered(second_name)
    x = torch.randn(2, 3, 8, 8)
    edge, cloud = prifu.split(wrapped, "iadd", x)
    assert difference(wrapped(x), cloud(edge(x))) < 1e-5


def scaled_query(y, z):
    query, key, value = torch.stack([y, z, y + z]).unbind(0)
    query *= 0.5
    return query * key, value


def coupled(y, z):
    first, second = y.chunk(2, 1)
    second += first * 2
    return torch.cat([first, second], 1), z


def gated(y, z):
    first, second = y.split([3, 5], 1)
    first *= torch.sigmoid(second[:, :3])
    return torch.cat([second, first], 1), z


def halves(y, z):
    first, second = y[:, :4], y[:, 4:]
    second += first
    first *= 2
    second -= 1
    return torch.cat([first, second], 1), y


def rows(y, z):
    stacked = torch.stack([y, z])
    first, second = stacked[0], stacked[1]
    first += second
    return first, second


def upcast(y, z):
    raised = y.float()
    raised *= torch.rsqrt(raised.pow(2).mean(1, keepdim=True) + 1e-6)
    return raised.to(y.dtype), z


def flattened(y, z):
    flat = y.flatten(2)
    flat *= 2.0
    return flat.view(y.shape), torch.zeros_like(y) + z


def overlapping(y, z):
    first, second = y[:, :5], y[:, 3:]
    second += 1
    return torch.cat([first, second], 1)[:, :8], z


APART = {
    f.__name__: f
    for f in (scaled_query, coupled, gated, halves, rows, upcast, flattened, overlapping)
}


@torch.no_grad()
@pytest.mark.parametrize("form", APART)
def test_what_shares_no_element_is_not_written_to(form):
    wrapped = filtered(APART[form])
    pruned = prifu.prune(wrapped, torch.randn(2, 3, 8, 8))
    check(wrapped, pruned)
    if form == "overlapping":
        assert "overwritten through a view" in str(prifu.report(pruned).notes)
    else:
        assert prifu.report(pruned).way != "parts"
        assert pruned.get_submodule("features.0").out_channels < 8


@pytest.mark.parametrize("at", ["features", "other", "add"])
def test_a_sum_in_a_constant_begins_anew_at_each_call(at):
    def how(y, z):
        total = torch.tensor(0.0)
        total += y.abs().mean()
        total += z.abs().mean()
        return y + z, z * total

    wrapped = filtered(how)
    halves = prifu.split(wrapped, at, torch.randn(2, 3, 8, 8), several=True)
    for _ in range(3):
        x = torch.randn(2, 3, 8, 8)
        assert difference(wrapped(x), halves.cloud(halves.edge(x))) < 1e-5


def test_a_write_into_a_constant_whose_result_is_dropped_is_left_to_python():
    def how(y, z):
        total = torch.tensor(0.0)
        total.add_(y.abs().mean())
        return y + z, z * total

    wrapped = filtered(how)
    pruned = prifu.prune(wrapped, torch.randn(2, 3, 8, 8))
    assert "Assign its result" in str(prifu.report(pruned).notes)
    for _ in range(2):
        x = torch.randn(2, 3, 8, 8)
        assert difference(wrapped(x), pruned(x)) < 1e-5


def test_a_write_keeps_the_type_of_what_is_written_to():
    def how(y, z):
        y += z.float()
        return y, z

    wrapped = filtered(how).bfloat16()
    x = torch.randn(2, 3, 8, 8).bfloat16()
    pruned = prifu.prune(wrapped, x)
    assert pruned(x).dtype == torch.bfloat16
    assert difference(wrapped(x), pruned(x)) < 0.1
