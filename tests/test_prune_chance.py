"""What both runs of the analysis share by chance: other sizes and other values are exact too."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prifu_plugin as prifu
from prifu_plugin.prune.verify import difference


class Patches(nn.Module):
    """A filtered map of a quarter of the size, and a body that is given its height and width."""

    def __init__(self, body):
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8)
        self.out = nn.Conv2d(8, 3, 3, padding=1)
        self.table, self.token = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 1, 1))
        self.kernel = nn.Parameter(torch.randn(8, 8, 5, 5))
        self.body = body

    def forward(self, x):
        x = self.norm(self.patch(x))
        return self.out(self.body(self, x, *x.shape[-2:]))


class Frames(nn.Module):
    """A filtered sequence of a quarter of the length."""

    def __init__(self, body):
        super().__init__()
        self.sub, self.norm = nn.Conv1d(6, 8, 4, 4), nn.LayerNorm(8)
        self.f, self.norm2, self.o = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.pos = nn.Parameter(torch.randn(50, 8))
        self.body = body

    def forward(self, x):
        h = self.norm(self.sub(x.transpose(1, 2)).transpose(1, 2))
        return self.o(self.body(self, self.norm2(self.f(h))))


class Lengths(nn.Module):
    """Sequences of fixed length with how much of them counts."""

    def __init__(self, body):
        super().__init__()
        self.pos, self.norm, self.f = nn.Parameter(torch.randn(1, 10, 8)), nn.LayerNorm(8), None
        self.f, self.norm2, self.o = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.w, self.body = nn.Parameter(torch.randn(12, 8)), body

    def forward(self, x, lengths):
        h = self.norm2(self.f(self.norm(x + self.pos)))
        return self.o(self.body(self, h, lengths.max().item()))


def pruned(model, example, bias):
    """Close every other channel, and prune."""
    model = prifu.wrap(model, bias=bias).double().eval()
    for unit in prifu.filters(model).values():
        unit.weight.data[::2] = 0.0
        if bias:
            unit.bias.data.normal_()
    return model, prifu.prune(model, example)


def agree(model, small, *inputs):
    expected = model(*inputs)
    assert difference(expected, small(*inputs)) <= 1e-11, [tuple(x.shape) for x in inputs]


PATCHES = {
    "a remainder that is 0": lambda s, x, h, w: x + x * (h % 4),
    "a quotient that is 0": lambda s, x, h, w: x + x * (h // 32),
    "0 divided": lambda s, x, h, w: x + (h % 4) / (x * x + 2),
    "padded to a multiple by a concatenation": lambda s, x, h, w: torch.cat(
        [x, x.new_zeros(x.shape[0], 8, -h % 4, w)], 2
    ),
    "padded by a token": lambda s, x, h, w: torch.cat(
        [x, s.token.expand(x.shape[0], -1, -h % 4, w)], 2
    ),
    "all but the first rows": lambda s, x, h, w: torch.cat(
        [x[:, :, :32], x[:, :, 32:] * 0.5], 2
    ),
    "a band": lambda s, x, h, w: x.tril(40).triu(-40),
    "an entry of a table": lambda s, x, h, w: x + s.table[h // 32][:, None, None],
    "a scale that grows": lambda s, x, h, w: x + s.table[0][:, None, None] * (1 + h // 32),
    "a kernel cut to the size": lambda s, x, h, w: F.conv2d(
        x, s.kernel[:, :, 1 : 4 + h // 32, 1 : 4 + h // 32], padding=1
    ),
    "padding by 0.5": lambda s, x, h, w: F.pad(x, (0, -w % 4, 0, -h % 4), value=0.5),
    "padding by -0.9": lambda s, x, h, w: F.pad(x, (0, -w % 4, 0, -h % 4), value=-0.9),
    "padding that is not pooled away": lambda s, x, h, w: F.max_pool2d(
        F.pad(x, (0, -w % 4, 0, -h % 4), value=-torch.inf), 3, 1
    ).clamp(min=-9.0),
    "windows": lambda s, x, h, w: x.unfold(2, 4, 4).transpose(3, 4).flatten(2, 3),
    "windows, reshaped": lambda s, x, h, w: (
        x.unfold(2, 4, 4).transpose(3, 4).reshape(x.shape[0], 8, h // 4 * 4, w)
    ),
    "windows, shuffled and back": lambda s, x, h, w: x.unfold(3, 4, 4).flip(3).flip(3).flatten(3),
    "windows of windows": lambda s, x, h, w: (
        x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 1, 2, 4, 3, 5).flatten(4).flatten(2, 3)
    ),
    "folded": lambda s, x, h, w: F.fold(
        F.unfold(x, 4, stride=4), (h // 4 * 4, w // 4 * 4), 4, stride=4
    ),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", PATCHES)
def test_sizes_that_no_run_has_seen(name, bias):
    torch.manual_seed(0)
    model, small = pruned(Patches(PATCHES[name]), torch.zeros(2, 3, 64, 64), bias)
    for size in (64, 84, 92, 140, 200):
        agree(model, small, torch.randn(1, 3, size, size + 4).double())


FRAMES = {
    "a roll by the length": (16, lambda s, h: h.roll(4, 1)),
    "an embedding of the length": (16, lambda s, h: h + s.pos[h.shape[1] - 1]),
    "the mean position": (16, lambda s, h: h + s.pos[: h.shape[1]].mean(0)),
    "sums": (4, lambda s, h: h.cumsum(1)),
    "a flip": (4, lambda s, h: h + h.flip(1)),
    "a shift": (4, lambda s, h: F.pad(h, (0, 0, 1, -1))),
    "sums of exponentials": (4, lambda s, h: h.logcumsumexp(1)),
    "differences": (4, lambda s, h: torch.cat([h[:, :1], h[:, 1:] - h[:, :-1]], 1)),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", FRAMES)
def test_inputs_that_differ_where_what_is_inside_does_not(name, bias):
    torch.manual_seed(0)
    length, body = FRAMES[name]
    model, small = pruned(Frames(body), torch.zeros(2, length, 6), bias)
    for other in (length, 40, 100):
        agree(model, small, torch.randn(1, other, 6).double())


LENGTHS = {
    "cut": lambda s, h, n: h[:, :n],
    "cut, then the mean": lambda s, h, n: h[:, :n].mean(1),
    "cut and padded": lambda s, h, n: F.pad(h[:, :n], (0, 0, 0, 10 - n)),
    "rolled to the end": lambda s, h, n: h.roll(10 - n, 1),
    "rolled channels": lambda s, h, n: h.roll(10 - n, 2),
    "scaled by what is missing": lambda s, h, n: h + h * (10 - n),
    "an entry of a table": lambda s, h, n: h + s.w[n],
    "weights from a table": lambda s, h, n: F.linear(h, s.w[n - 4 : n + 4].view(-1, 8)[-8:]),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", LENGTHS)
def test_numbers_that_are_read_from_tensors_may_be_others(name, bias):
    torch.manual_seed(0)
    example = torch.zeros(2, 10, 8), torch.tensor([8, 8])
    model, small = pruned(Lengths(LENGTHS[name]), example, bias)
    for lengths in ([8, 8], [4, 7], [5, 6]):
        x = torch.randn(2, 10, 8).double()
        agree(model, small, x, torch.tensor(lengths))


class Signs(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.b, self.m = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.o, self.body = nn.Conv2d(8, 2, 1), body
        nn.init.constant_(self.a.bias, 20.0)
        nn.init.constant_(self.n.bias, -0.5)

    def forward(self, x):
        return self.o(self.body(self.n(self.a(x)), self.m(self.b(x))))


@pytest.mark.parametrize("body", [lambda a, b: torch.copysign(b, a), torch.atan2])
def test_the_sign_of_a_closed_channel_stays(body):
    """A closed channel is 0 times a number: its sign may matter, and Gaussian inputs show one."""
    torch.manual_seed(0)
    model = prifu.wrap(Signs(body)).double().eval()
    prifu.filters(model)["n"].weight.data[::2] = 0.0
    small = prifu.prune(model, torch.zeros(2, 3, 8, 8))
    for scale in (1, 100):
        agree(model, small, scale * torch.randn(3, 3, 9, 9).double())
