"""Modules that decide on sizes: looked into, exact, refused where they would decide otherwise."""

import copy
import hashlib
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prune_kinds import half_off
from torch import nn

import prifu_plugin as prifu
from prifu_plugin.errors import CaptureError
from prifu_plugin.graph.guards import GUARD, is_guard
from prifu_plugin.graph.sized import capture_sized
from prifu_plugin.prune.verify import difference


class Windows(nn.Module):
    """Pad to whole windows, mix inside each, cut off what was padded; branches on sizes."""

    def __init__(self, channels=8, window=4):
        super().__init__()
        self.window = window
        self.norm = nn.LayerNorm(channels)
        self.mix = nn.Linear(channels, channels)

    def forward(self, x):
        b, c, h, w = x.shape
        size = self.window
        right, low = (size - w % size) % size, math.ceil(h / size) * size - h
        if right > 0 or low > 0:
            x = F.pad(x, (0, right, 0, low))
        rows, columns = x.shape[2] // size, x.shape[3] // size
        x = x.view(b, c, rows, size, columns, size).permute(0, 2, 4, 3, 5, 1)
        x = self.mix(self.norm(x.reshape(-1, size * size, c)))
        x = x.view(b, rows, columns, size, size, c).permute(0, 5, 1, 3, 2, 4)
        x = x.reshape(b, c, rows * size, columns * size)
        return x[:, :, :h, :w] if right or low else x


class Loops(nn.Module):
    """A loop, a square root and a rounding of sizes."""

    def __init__(self, channels=8):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        x = self.norm(x)
        side = int((x.shape[2] * x.shape[3]) ** 0.5)
        total = x * float(side)
        for step in range(x.shape[1] // 4):
            total = total + torch.relu(x) / (1 + step)
        assert len(total.shape) == 4
        return total


class Marked(nn.Module):
    """A mask that is written region by region, as shifted windows have it."""

    def __init__(self, channels=8):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        x = self.norm(x)
        mask = x.new_zeros((x.shape[2], x.shape[3]))
        for count, rows in enumerate((slice(0, -2), slice(-2, None))):
            mask[rows, : x.shape[3] // 2] = count
        return x + torch.tensor(x.shape[2]) * mask


class OnValues(nn.Module):
    """Decides on what a tensor holds."""

    def __init__(self, channels=8):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        x = self.norm(x)
        return x * 2 if x.mean() > 0 else x


class Around(nn.Module):
    """A part between convolutions, so that channels can be removed on both sides."""

    def __init__(self, part):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.before = nn.BatchNorm2d(8)
        self.part = part
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.last(self.part(torch.relu(self.before(self.first(x)))))


timm.layers.register_notrace_module(Windows)
timm.layers.register_notrace_module(Loops)
timm.layers.register_notrace_module(OnValues)
timm.layers.register_notrace_module(Marked)


def filtered(part, share=0.5, seed=0):
    torch.manual_seed(seed)
    model = prifu.wrap(Around(part)).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    for unit in prifu.filters(model).values():
        unit.weight.data[torch.rand(len(unit.weight)) < share] = 0.0
    return model


@pytest.mark.parametrize("part", [Windows, Loops, Marked])
@pytest.mark.parametrize("size", [(8, 8), (6, 7)])
def test_what_decides_on_sizes_is_pruned_inside(part, size):
    model = filtered(part())
    x = torch.randn(2, 3, *size).double()
    pruned = prifu.prune(model, x)
    assert "no rule" not in str(prifu.report(pruned).notes)
    before, after = prifu.report(pruned).macs
    assert after < before
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, *size).double()
        torch.testing.assert_close(pruned(x), model(x), rtol=0, atol=1e-11)


def test_other_sizes_are_computed_or_refused_but_never_wrong():
    model = filtered(Windows())
    pruned = prifu.prune(model, torch.zeros(2, 3, 8, 8).double())
    same = torch.randn(1, 3, 12, 16).double()  # whole windows, as when it was pruned
    torch.testing.assert_close(pruned(same), model(same), rtol=0, atol=1e-11)
    with pytest.raises(AssertionError, match="again with example_inputs= of this size"):
        pruned(torch.randn(1, 3, 9, 8).double())


def answer(model, x):
    """Return what a model gives, or why it refuses."""
    try:
        return model(x)
    except AssertionError as error:
        return str(error)


@given(st.integers(3, 13), st.integers(3, 13), st.integers(2, 5), st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_any_window_any_size(height, width, window, seed):
    model = filtered(Windows(window=window), seed=seed)
    pruned = prifu.prune(model, torch.zeros(1, 3, height, width).double())
    for h, w in ((height, width), (height + window, width), (height + 1, width)):
        x = torch.randn(2, 3, h, w).double()
        found = answer(pruned, x)
        if isinstance(found, str):
            assert found == GUARD
            assert (h, w) != (height, width)
        else:
            torch.testing.assert_close(found, model(x), rtol=0, atol=1e-10)


def test_what_decides_on_values_stays_closed_and_is_named():
    model = filtered(OnValues())
    x = torch.randn(2, 3, 8, 8).double()
    pruned = prifu.prune(model, x)
    assert "no rule for OnValues at 'part'" in str(prifu.report(pruned).notes)
    for sign in (1, -1):
        torch.testing.assert_close(pruned(sign * x), model(sign * x), rtol=0, atol=1e-11)
    with pytest.raises(CaptureError, match="decides on values"):
        capture_sized(OnValues(), [torch.randn(2, 8, 4, 4)])


class Overwrites(nn.Module):
    """Writes into scattered places of what was computed from the input."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.norm(x).clone()
        x[:, [1, 3]] = 0.0
        return x if x.shape[1] else x * 2


timm.layers.register_notrace_module(Overwrites)


def test_what_writes_into_values_stays_closed():
    model = filtered(Overwrites())
    x = torch.randn(2, 3, 8, 8).double()
    pruned = prifu.prune(model, x)
    assert "no rule for Overwrites" in str(prifu.report(pruned).notes)
    torch.testing.assert_close(pruned(x), model(x), rtol=0, atol=1e-11)


def test_a_model_made_for_a_size_is_rebuilt():
    model = filtered(Windows())
    x = torch.randn(2, 3, 6, 7).double()
    pruned = prifu.prune(model, x)
    torch.manual_seed(1)
    again = prifu.rebuild(Around(Windows()), prifu.plan(pruned), pruned.state_dict())
    assert torch.equal(again(x), pruned(x))


def test_guards_survive_what_pruned_models_go_through():
    pruned = prifu.prune(filtered(Windows()), torch.zeros(2, 3, 8, 8).double())
    for made in (
        copy.deepcopy(pruned),
        torch.export.export(pruned, (torch.zeros(2, 3, 8, 8).double(),)).module(),
    ):
        with pytest.raises((AssertionError, RuntimeError)):
            made(torch.zeros(2, 3, 9, 8).double())
    assert sum(is_guard(node) for node in pruned.graph.nodes) >= 2


def test_capture_changes_nothing():
    model = Around(Loops()).eval()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    capture_sized(model, [torch.randn(1, 3, 8, 8)])
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


class Assigns(nn.Module):
    """Writes into parts of a tensor it has computed, and looks at its sizes."""

    def __init__(self, body):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.head = nn.Conv2d(8, 2, 1)
        self.body = body

    def forward(self, x):
        y = self.stem(x) * 1.0
        if y.shape[-1] < 2:
            raise ValueError("too small")
        return self.head(self.body(y))


def rows_and_columns(y):
    y[:, :, 1:, :-1] = y[:, :, 1:, :-1].sigmoid() + y.mean((2, 3), keepdim=True)
    y[:, 0] = 3.0
    y[:, :, y.shape[2] // 2] = 0
    return y


def channels(y):
    y[:, 2:5] = y[:, :3].tanh()
    y[:] = y * 2
    return y


def made_of_sizes(y):
    shifted = y.new_zeros(y.shape)
    shifted[:, :, 1:] = y[:, :, :-1]
    shifted[..., ::2] = 1.5
    shifted[0] = y[:1]
    shifted[:] = shifted + y
    return shifted + y


def parts_in_place(y):
    y[:, 2:4].zero_()
    y[:, :, 1:].add_(1.0)
    y[:, 5].copy_(y[:, 6])
    y[:, 7:, ::2].fill_(2.0)
    doubled = y[:, 1:3].mul_(2.0)
    return y + doubled.mean(1, keepdim=True)


def reads_what_was_written(y):
    part = y[:, 2:]
    part.zero_()
    return y + part.mean()


def reads_another_chunk(y):
    left, right = y.chunk(2, 1)
    pair = y.chunk(2, 1)
    pair[0][:, 0] = 1.0
    return torch.cat([pair[0], pair[1], left[:, :0], right[:, :0]], 1)


def reads_an_old_view(y):
    old = y[:, 2:]
    y[:, :, 1:] = 1.0
    return y + old.mean()


BODIES = [rows_and_columns, channels, made_of_sizes, parts_in_place]


@pytest.mark.parametrize("body", BODIES)
def test_assignments_become_nodes(body):
    torch.manual_seed(0)
    model = prifu.wrap(Assigns(body)).eval()
    prifu.filters(model)["stem.1"].weight.data[::2] = 0.0
    x = torch.randn(3, 3, 10, 7)
    pruned = prifu.prune(model, x[:2])
    assert max(c.difference for c in prifu.report(pruned).checks) < 1e-6
    # What is filled needs one channel for its shape, what is overwritten is not computed.
    widths = {rows_and_columns: 5, channels: 3, parts_in_place: 2}
    assert pruned.get_submodule("stem.0").out_channels == widths.get(body, 4)
    torch.testing.assert_close(pruned(x), model(x))


@torch.no_grad()
@pytest.mark.parametrize("body", [reads_an_old_view, reads_another_chunk, reads_what_was_written])
def test_a_view_of_what_was_overwritten_is_not_followed(body):
    model = prifu.wrap(Assigns(body)).eval()
    prifu.filters(model)["stem.1"].weight.data[::2] = 0.0
    x = torch.randn(3, 3, 8, 8)
    pruned = prifu.prune(model, x)
    assert "overwritten through a view" in str(prifu.report(pruned).notes)
    torch.testing.assert_close(pruned(x), model(x))


class Clamping(nn.Module):
    """Swin's way: a window that is larger than the input is made smaller, for good."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 4, 1)
        self.window = 48

    def forward(self, x):
        self.window = min(self.window, x.shape[-1])
        y = self.norm(self.first(x))
        return self.last(y.roll(self.window // 4, 3)) * self.window


@pytest.mark.parametrize("size", [64, 40, 8])
def test_what_another_size_leaves_behind_is_not_kept(size):
    model = half_off(prifu.wrap(Clamping()))
    x = torch.randn(2, 3, size, size)
    before = dict(vars(model))
    pruned = prifu.prune(model, (torch.zeros(1, 3, size, size),))
    assert vars(model)["window"] == before["window"] == 48
    assert difference(model(x), pruned(x)) <= 1e-5


class Parts(nn.Module):
    """Loops over parts of a batch; how many there are shows at larger batches only."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        y = self.norm(self.first(x))
        return torch.cat([self.last(part) for part in self.how(y)])


@pytest.mark.parametrize("how", ["split", "chunk", "unbind", "length"])
def test_the_number_of_parts_is_guarded(how):
    loops = {
        "split": lambda y: y.split(4),
        "chunk": lambda y: torch.chunk(y, 3),
        "unbind": lambda y: [part[None] for part in y.unbind()],
        "length": lambda y: [y * len(y.split(4))],
    }
    model = half_off(prifu.wrap(Parts(loops[how])))
    if how in ("chunk", "unbind"):  # another course at any two batch sizes
        with pytest.raises(CaptureError, match="for each batch size"):
            prifu.prune(model, torch.zeros(2, 3, 8, 8))
        return
    pruned = prifu.prune(model, torch.zeros(2, 3, 8, 8))
    for batch in (1, 2, 3, 4, 5, 9):
        x = torch.randn(batch, 3, 8, 8)
        found = answer(pruned, x)
        assert (isinstance(found, str) and batch > 4) or difference(model(x), found) <= 1e-6


class ByType(nn.Module):
    """Decides on its type and, inside, on sizes."""

    def __init__(self):
        super().__init__()
        self.place = nn.Parameter(torch.randn(1, 8, 4, 4))
        self.c, self.n, self.t = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        h = self.n(self.c(x))
        kind = self.place.dtype if self.place.dtype == torch.float64 else torch.float32
        place = self.place.to(kind)
        if h.shape[-1] != 4:
            place = torch.nn.functional.interpolate(place, size=h.shape[-2:], mode="bilinear")
        return self.t(h + place.to(self.place.dtype))


def test_what_is_decided_on_types_is_no_matter_of_precision():
    model = prifu.wrap(ByType()).eval()
    prifu.filters(model)["n"].weight.data[::2] = 0.0
    pruned = prifu.prune(model, torch.randn(2, 3, 9, 9))
    x = torch.randn(5, 3, 9, 9)
    torch.testing.assert_close(pruned(x), model(x), rtol=1e-5, atol=1e-5)


class ByShape(nn.Module):
    """Decides on whether an image is a square, and computes a weight."""

    def __init__(self):
        super().__init__()
        self.c, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.v, self.b = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.zeros(2))

    def forward(self, x):
        y = self.bn(self.c(x)).relu()
        if x.shape[-1] != x.shape[-2]:
            y = y * 2
        return F.linear(y.mean((2, 3)), self.v / self.v.norm(dim=1, keepdim=True), self.b)


def test_layers_are_made_after_sizes_were_tried_in_turn():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    model = prifu.wrap(ByShape(), example_inputs=x).eval()
    prifu.filters(model)["bn"].weight.data[:3] = 0.0
    pruned = prifu.prune(model, x)
    torch.testing.assert_close(pruned(x), model(x))
    assert pruned.get_submodule("c").out_channels == 5


def test_the_words_of_guards_stay():
    """They are part of the graph by which a plan is recognized, and kept plans have these."""
    assert hashlib.sha256(GUARD.encode()).hexdigest().startswith("3c6ccd296ff5d182")
