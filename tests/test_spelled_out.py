"""Operations that are said by others, and those that torch marks: what feeds them shrinks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prifu_plugin as prifu
from prifu_plugin.prune.verify import difference


class Net(nn.Module):
    """An inner width of 12 in 3 heads of 4, between a filter and a head, on (N, L, 8)."""

    def __init__(self, body, **shapes):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 12), nn.LayerNorm(12), nn.LazyLinear(5)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape) / 3))
        self.body = body

    def forward(self, x):
        return self.last(self.body(self, self.norm(self.first(x))))


PRODUCTS = {
    "@": (lambda s, h: h @ s.w, {"w": (12, 6)}),
    "matmul": (lambda s, h: torch.matmul(h, s.w), {"w": (12, 6)}),
    "method": (lambda s, h: h.matmul(s.w), {"w": (12, 6)}),
    "transposed": (lambda s, h: h @ s.w.T, {"w": (6, 12)}),
    "a vector": (lambda s, h: (h @ s.w).unsqueeze(-1), {"w": (12,)}),
    "mm": (lambda s, h: torch.mm(h.flatten(0, 1), s.w).unflatten(0, (-1, 7)), {"w": (12, 6)}),
    "addmm": (
        lambda s, h: torch.addmm(s.b, h.flatten(0, 1), s.w).unflatten(0, (-1, 7)),
        {"w": (12, 6), "b": (6,)},
    ),
    "einsum": (lambda s, h: torch.einsum("nlc,cd->nld", h, s.w), {"w": (12, 6)}),
    "einsum, dots": (lambda s, h: torch.einsum("...c,dc->...d", h, s.w), {"w": (6, 12)}),
    "einsum, the parameter first": (
        lambda s, h: torch.einsum("cd, nlc -> nld", s.w, h),
        {"w": (12, 6)},
    ),
    "einsum, into heads": (
        lambda s, h: torch.einsum("nlc,hcd->nlhd", h, s.w).flatten(2),
        {"w": (2, 12, 3)},
    ),
    "einsum, of heads": (
        lambda s, h: torch.einsum("nlhd,dho->nlo", h.unflatten(-1, (3, 4)), s.w),
        {"w": (4, 3, 6)},
    ),
}
WHOLE = {
    "summed away": (lambda s, h: torch.einsum("nlc,cd->nl", h, s.w)[..., None], {"w": (12, 6)}),
    "a batch of them": (lambda s, h: torch.einsum("nlc,cd->nlcd", h, s.w)[..., 0], {"w": (12, 6)}),
    "over places": (lambda s, h: torch.einsum("nlc,lm->nmc", h, s.w), {"w": (7, 7)}),
    "over places, the other way": (lambda s, h: s.w @ h, {"w": (7, 7)}),
    "read twice": (lambda s, h: h @ s.w @ s.w, {"w": (12, 12)}),
    "scaled": (
        lambda s, h: torch.addmm(s.b, h.flatten(0, 1), s.w, alpha=2).unflatten(0, (-1, 7)),
        {"w": (12, 6), "b": (6,)},
    ),
}


def pruned(body, shapes, *, bias):
    """Close 7 of 12 channels of a net and prune it; returns the widths of the first layer too."""
    torch.manual_seed(0)
    net = Net(body, **shapes).double()
    with torch.no_grad():
        net(torch.zeros(2, 7, 8, dtype=torch.float64))
    net = prifu.wrap(net, bias=bias).eval()
    unit = prifu.filters(net)["norm"]
    unit.weight.data[::2] = 0.0
    unit.weight.data[3] = 0.0
    if bias:
        unit.bias.data.normal_()
    small = prifu.prune(net, torch.zeros(2, 7, 8))
    x = torch.randn(4, 7, 8, dtype=torch.float64)
    assert difference(net(x), small(x)) <= 1e-11
    return small


def kept(report):
    fate = {fate.path: fate for fate in report.layers}["norm"]
    return fate.channels - fate.removed


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_with_a_parameter_are_sliced(name, bias):
    body, shapes = PRODUCTS[name]
    small = pruned(body, shapes, bias=bias)
    report = prifu.report(small)
    assert not [note for note in report.notes if "no rule" in note[1]]
    assert kept(report) == 5
    given = [torch.Size(shape).numel() for part, shape in shapes.items() if part == "w"]
    own = ("first", "norm", "last")
    taken = [p for path, p in small.named_parameters() if path.split(".")[0] not in own]
    assert sum(p.numel() for p in taken if p.ndim > 1) == sum(given) * 5 // 12
    assert all(p.requires_grad for p in taken)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", WHOLE)
def test_products_that_are_no_linear_map_of_channels_are_exact(name, bias):
    pruned(*WHOLE[name], bias=bias)


MARKED = {
    "atan": lambda s, h: torch.atan(h),
    "method": lambda s, h: h.sinh(),
    "two operands": lambda s, h: torch.logaddexp(h, h * 2),
    "special": lambda s, h: torch.special.erfcx(h.clamp(-1, 1)),
    "where": lambda s, h: torch.where(s.w > 0, h, h * 0.1),
    "masked": lambda s, h: h.masked_fill(s.w > 0, 0.25),
    "of several": lambda s, h: F.tanhshrink(h),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", MARKED)
def test_what_torch_marks_as_pointwise_passes_channels_on(name, bias):
    small = pruned(MARKED[name], {"w": (12,)}, bias=bias)
    report = prifu.report(small)
    assert not [note for note in report.notes if "no rule" in note[1]]
    assert kept(report) == 5


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("jump", [torch.round, torch.sign, torch.floor])
def test_what_jumps_is_kept_whole_and_named(jump, bias):
    small = pruned(lambda s, h: jump(h), {}, bias=bias)
    assert [note for note in prifu.report(small).notes if f"no rule for {jump.__name__}" in note[1]]


LARGEST = {
    "values": lambda s, h: h.max(1)[0],
    "named": lambda s, h: torch.max(h, dim=1).values,
    "kept": lambda s, h: torch.min(h, 1, keepdim=True)[0].squeeze(1),
    "negative": lambda s, h: h.min(dim=-2, keepdim=False)[0],
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", LARGEST)
def test_the_largest_along_places_passes_channels_on(name, bias):
    small = pruned(LARGEST[name], {}, bias=bias)
    report = prifu.report(small)
    assert not [note for note in report.notes if "no rule" in note[1]]
    assert kept(report) == 5


@pytest.mark.parametrize("bias", [False, True])
def test_where_the_largest_is_stays_as_it_is(bias):
    def body(s, h):
        values, where = h.max(1)
        return values + where

    pruned(body, {}, bias=bias)
