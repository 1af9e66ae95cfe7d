"""Random forwards of odd steps: each is pruned exactly or refused, at any input; never wrong."""

import dataclasses
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import prifu_plugin as prifu
from prifu_plugin.errors import PrifuError
from prifu_plugin.graph.guards import GUARD
from prifu_plugin.prune.verify import difference

WIDTH = 6


class Block(nn.Module):
    """A filtered layer; what surrounds it is what differs below."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH)

    def forward(self, x):
        return self.norm(self.conv(x))


class OnValues(Block):
    def forward(self, x):
        y = super().forward(x)
        return y.relu() if x.mean() > 0 else -y


class OnItem(Block):
    def forward(self, x):
        return super().forward(x) * float(x.detach().mean())


class OnSizes(Block):
    def forward(self, x):
        y = super().forward(x)
        return y.flip(-1) if x.shape[-1] % 2 else y * x.shape[-2]


class Looping(Block):
    def forward(self, x):
        parts = [super(Looping, self).forward(part) for part in x.split(1 + x.shape[0] // 2)]
        return torch.cat(parts)


class InPlace(Block):
    def forward(self, x):
        y = super().forward(x)
        y[:, 1:3] = 0.5
        y.add_(x).clamp_(-2, 2)
        return y


class Settings(Block):
    """Takes what is no tensor."""

    def forward(self, x, scale=1.0, *, mode="plain", sizes=None, more=None):
        y = super().forward(x) * scale
        if mode == "tanh":
            y = y.tanh()
        return y if more is None else y + more["x"][0]


@dataclasses.dataclass
class Pair:
    first: torch.Tensor
    second: torch.Tensor | None = None


class Structured(Block):
    """Returns structures, and takes them."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        y = super().forward(x)
        match self.kind:
            case "tuple":
                return y, None, x
            case "dict":
                return {"y": y, "x": x, "n": 3}
            case _:
                return Pair(y)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2 + 1

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Custom(Block):
    def forward(self, x):
        return Doubled.apply(super().forward(x))


class Remembers(Block):
    """Stores what it sees, and counts."""

    def __init__(self):
        super().__init__()
        self.calls, self.seen = 0, None
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.seen = x
        self.total = self.total + 1
        return super().forward(x) + self.seen


class Inner(nn.Module):
    """Holds a block that another holds too."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x).sigmoid()


def unpacked(m, x):
    found = m(x)
    if isinstance(found, tuple):
        return found[0] - found[-1]
    return found["y"] * found["n"] if isinstance(found, dict) else found.first


STEPS = {
    "on values": (OnValues, lambda m, x: m(x)),
    "on an item": (OnItem, lambda m, x: m(x)),
    "on sizes": (OnSizes, lambda m, x: m(x)),
    "a loop over parts": (Looping, lambda m, x: m(x)),
    "in place": (InPlace, lambda m, x: m(x)),
    "in place on what is read again": (Block, lambda m, x: x + m(x).relu_().mul_(0.5)),
    "settings": (Settings, lambda m, x: m(x, 2.0, mode="tanh", sizes=[1, 2], more={"x": [x]})),
    "tuple": (lambda: Structured("tuple"), unpacked),
    "dict": (lambda: Structured("dict"), unpacked),
    "dataclass": (lambda: Structured("dataclass"), unpacked),
    "custom function": (Custom, lambda m, x: m(x)),
    "memory": (Remembers, lambda m, x: m(x)),
    "twice": (Block, lambda m, x: m(m(x).relu())),
    "shared": (lambda: Inner(SHARED[0]), lambda m, x: m(x)),
    "no gradient": (Block, lambda m, x: x + m(x).detach()),
    "plain": (Block, lambda m, x: F.relu(m(x))),
    "made": (Block, lambda m, x: m(x) + torch.ones(1, 1, 1).expand(x.shape[0], -1, -1, 1)),
    "pool": (Block, lambda m, x: F.interpolate(F.avg_pool2d(m(x), 2), x.shape[2:])),
}
SHARED = [None]


class Odd(nn.Module):
    """A stem, steps by name, and a head that returns a tensor, a tuple or a dictionary."""

    def __init__(self, names, ends):
        super().__init__()
        SHARED[0] = Block()
        self.names, self.ends = names, ends
        self.stem = nn.Sequential(nn.Conv2d(3, WIDTH, 1), nn.BatchNorm2d(WIDTH))
        self.steps = nn.ModuleList(STEPS[name][0]() for name in names)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        y = self.stem(x)
        for name, step in zip(self.names, self.steps, strict=True):
            y = STEPS[name][1](step, y)
        out = self.head(y.mean((2, 3)))
        return {"tensor": out, "tuple": (out, y), "dict": {"out": out, "map": y}}[self.ends]


def closed_at_random(model, seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.bias.data.normal_()
            norm.running_mean.normal_()
    for unit in prifu.filters(model).values():
        for channel in range(WIDTH):
            if draw.random() < 0.5:
                unit.weight.data[channel] = 0.0
        if unit.bias is not None:
            unit.bias.data.normal_()
    return model.eval()


def answer(model, x):
    """Return what a model says; its word for a size that it was not made for."""
    try:
        with torch.no_grad():
            return model(x.clone())
    except AssertionError as error:
        if str(error) != GUARD:
            raise
        return None


def exact_or_refused(names, ends, bias, seed):
    torch.manual_seed(seed)
    net = Odd(names, ends).double()
    try:
        model = closed_at_random(prifu.wrap(net, bias=bias), seed)
        pruned = prifu.prune(model, torch.zeros(2, 3, 8, 8))
    except PrifuError as error:
        return f"refused: {error}"
    refusals = 0
    for shape in [(2, 3, 8, 8), (5, 3, 8, 8), (1, 3, 8, 8), (2, 3, 9, 12), (3, 3, 6, 7)]:
        for sign in (-1.0, 1.0):
            x = torch.randn(shape, dtype=torch.float64) + sign
            found = answer(pruned, x)
            refusals += found is None
            assert found is None or difference(model(x), found) <= 1e-9
    assert refusals <= 6  # never for the batch
    return "exact"


CASES = {
    "names": st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=4),
    "ends": st.sampled_from(["tensor", "tuple", "dict"]),
    "bias": st.booleans(),
    "seed": st.integers(0, 999),
}


@pytest.mark.parametrize("name", STEPS)
def test_each_step(name):
    for seed, ends in enumerate(("tensor", "tuple", "dict")):
        assert exact_or_refused([name, "plain"], ends, seed % 2 == 0, seed) == "exact"


def test_a_tensor_that_the_forward_makes_is_expanded_to_sizes():
    model = closed_at_random(prifu.wrap(Odd(["made"], "tensor")), 0)
    pruned = prifu.prune(model, torch.zeros(2, 3, 8, 8))
    assert prifu.report(pruned).way == "graph"


@settings(max_examples=10, deadline=None)
@given(**CASES)
def test_some_forwards(names, ends, bias, seed):
    exact_or_refused(names, ends, bias, seed)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(**CASES)
def test_many_forwards(names, ends, bias, seed):
    exact_or_refused(names, ends, bias, seed)


class ByProduct(nn.Module):
    """Counts places with numpy, which asks a shape for a method that it does not have."""

    def __init__(self):
        super().__init__()
        self.block, self.head = Block(), nn.Linear(WIDTH, 3)

    def forward(self, x):
        y = self.block(x)
        return self.head(y.sum((2, 3))) / np.prod(y.shape[2:])


def test_a_graph_that_was_traced_but_does_not_run_is_made_of_sizes():
    model = closed_at_random(prifu.wrap(ByProduct()), 0)
    pruned = prifu.prune(model, torch.zeros(2, WIDTH, 8, 8))
    assert prifu.report(pruned).way == "sizes"
    x = torch.randn(5, WIDTH, 8, 8)
    torch.testing.assert_close(pruned(x), model(x))
    with pytest.raises(AssertionError, match="other input sizes"):
        pruned(torch.randn(2, WIDTH, 9, 8))
