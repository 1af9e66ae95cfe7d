"""Layers that are called several times: one slice serves all calls, and the outputs stay."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import prifu_plugin as prifu


class Recurrent(nn.Module):
    """One block called several times, on what it returned before."""

    def __init__(self, layers, between, times=3):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.body = layers
        self.between = between
        self.head = nn.Linear(8, 3)
        self.times = times

    def forward(self, x):
        state = self.stem(x)
        for _ in range(self.times):
            state = self.between(self.body(state))
        return self.head(state.mean((2, 3)))


class Pyramid(nn.Module):
    """One head on several levels, of which the last is a constant."""

    def __init__(self):
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)) for _ in range(3)
        )
        self.head = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.ReLU())
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return [self.last(self.head(level(x))) for level in self.levels]


def spoil(model, seed, share=0.5):
    """Close channels at random and give every layer constants that show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for value in (module.bias, module.running_mean):
                    value.copy_(torch.randn(value.shape, generator=generator))
        for unit in prifu.filters(model).values():
            unit.weight[torch.rand(unit.weight.shape, generator=generator) < share] = 0.0


def conv(groups=1, mode="zeros"):
    return nn.Conv2d(8, 8, 3, padding=1, groups=groups, padding_mode=mode)


BODIES = {
    "dense": lambda: nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU(), conv()),
    "grouped": lambda: nn.Sequential(conv(4), nn.BatchNorm2d(8), nn.ReLU(), conv(2)),
    "depthwise": lambda: nn.Sequential(conv(8), nn.BatchNorm2d(8)),
    "reflected": lambda: nn.Sequential(conv(1, "reflect"), nn.BatchNorm2d(8)),
    "group norm": lambda: nn.Sequential(conv(), nn.GroupNorm(4, 8), conv()),
}


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("between", [nn.Tanh, nn.Identity, nn.Sigmoid])
@pytest.mark.parametrize("bias", [False, True])
def test_calls_share_one_exact_slice(body, between, bias):
    for seed in range(2):
        torch.manual_seed(seed)
        model = prifu.wrap(Recurrent(BODIES[body](), between()), bias=bias)
        spoil(model, seed)
        pruned = prifu.prune(model, torch.zeros(2, 3, 6, 6))
        assert max(c.difference for c in prifu.report(pruned).checks) < 1e-5
        assert not [name for name, _ in pruned.named_modules() if "_call" in name]
        before = sum(p.numel() for p in model.parameters())
        assert sum(p.numel() for p in pruned.parameters()) < before


def test_what_sharing_costs_is_said():
    torch.manual_seed(0)
    model = prifu.wrap(Pyramid())
    for at in range(3):  # each level has two channels of its own
        weight = prifu.filters(model)[f"levels.{at}.1"].weight.data
        weight[[c for c in range(6) if c // 2 != at]] = 0.0
    notes = prifu.report(prifu.prune(model, torch.zeros(2, 3, 6, 6))).notes
    said = [text for _, text in notes if "3 calls: 67 % of what it reads" in text]
    assert len(said) == 1


def test_a_level_that_is_constant_shares_the_head():
    torch.manual_seed(0)
    model = prifu.wrap(Pyramid())
    spoil(model, 0)
    with torch.no_grad():
        prifu.filters(model)["levels.2.1"].weight.zero_()
    pruned = prifu.prune(model, torch.zeros(2, 3, 6, 6))
    assert isinstance(pruned.get_submodule("head.0"), nn.Conv2d)
    assert sum(isinstance(m, nn.GroupNorm) for m in pruned.modules()) == 1
    x = torch.randn(3, 3, 9, 9)
    for expected, found in zip(model.eval()(x), pruned(x), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_rebuilt_model_shares_them_too():
    torch.manual_seed(0)
    make = lambda: Recurrent(BODIES["dense"](), nn.Tanh())  # noqa: E731
    model = prifu.wrap(make())
    spoil(model, 1)
    pruned = prifu.prune(model, torch.zeros(2, 3, 6, 6))
    again = prifu.rebuild(make(), prifu.plan(pruned), pruned.state_dict())
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(again(x), pruned(x))
    assert again.get_submodule("body.0").weight.numel() < 8 * 8 * 9


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 10**6), st.sampled_from(sorted(BODIES)), st.integers(1, 4))
def test_any_masks_are_exact(seed, body, times):
    torch.manual_seed(seed)
    model = prifu.wrap(Recurrent(BODIES[body](), nn.Hardtanh(), times), bias=bool(seed % 2))
    spoil(model, seed, share=0.2 + 0.6 * (seed % 7) / 7)
    report = prifu.report(prifu.prune(model, torch.zeros(2, 3, 5, 5)))
    assert max(c.difference for c in report.checks if c.dtype == "float64") < 1e-10
    assert report.parameters[1] <= report.parameters[0]
