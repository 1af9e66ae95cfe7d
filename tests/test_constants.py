"""Tensors that a forward makes of numbers: rounded in fp32, and no reason to refuse a model."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prifu_plugin as prifu
from prifu_plugin.prune.verify import difference


def angles(count, width):
    places = torch.arange(count)[:, None]
    return places / 10000 ** (torch.arange(width) / width)


MADE = {
    "a third": lambda x: x + torch.tensor(1 / 3),
    "a list": lambda x: x * torch.tensor([1 / 3] * 8),
    "full": lambda x: x + torch.full((8,), 1 / 3),
    "steps": lambda x: x + torch.linspace(0, 1, 8),
    "frequencies": lambda x: x * torch.exp(-math.log(10000) * torch.arange(8.0) / 8),
    "positions": lambda x: x + torch.sin(angles(x.shape[1], 8)),
    "rotary": lambda x: (
        x * torch.cos(angles(7, 8)) + torch.cat((-x[..., 4:], x[..., :4]), -1) * angles(7, 8).sin()
    ),
    "as a kernel": lambda x: F.linear(x, torch.cos(angles(8, 8))),
    "of its type": lambda x: x + torch.tensor(1 / 3, dtype=x.dtype, device=x.device),
    "whole numbers": lambda x: x[..., torch.arange(8).flip(0)] / 3,
}


class Making(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.enter, self.norm, self.out = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.make = make

    def forward(self, x):
        return self.out(self.make(self.norm(self.enter(x))))


@pytest.mark.parametrize("name", MADE)
def test_what_a_forward_makes_is_compared_in_fp64(name):
    torch.manual_seed(0)
    model = prifu.wrap(Making(MADE[name])).eval()
    prifu.filters(model)["norm"].weight.data[:4] = 0.0
    pruned = prifu.prune(model, torch.randn(2, 7, 6))
    checks = prifu.report(pruned).checks
    assert max(c.difference for c in checks if c.dtype == "float64") <= 1e-11
    x = torch.randn(5, 7, 6)
    assert difference(model(x), pruned(x)) <= 1e-5
    assert {v.dtype for v in pruned.state_dict().values()} <= {torch.float32, torch.int64}
    again = prifu.rebuild(Making(MADE[name]), prifu.plan(pruned), pruned.state_dict())
    torch.testing.assert_close(again(x), pruned(x), rtol=0, atol=0)


def test_a_constant_that_is_another_in_fp64_is_still_a_mistake():
    class Deciding(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.norm, self.out = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

        def forward(self, x):
            step = torch.finfo(torch.tensor(1.0).dtype).eps  # of the default type
            return self.out(self.norm(self.enter(x)) + torch.tensor(1e7 * step))

    model = prifu.wrap(Deciding()).eval()
    prifu.filters(model)["norm"].weight.data[:4] = 0.0
    with pytest.raises(prifu.errors.VerificationError):
        prifu.prune(model, torch.randn(2, 7, 6))
