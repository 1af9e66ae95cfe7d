"""Layers of one's own: what docs/extending.md shows works, and a wrong declaration is refused."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import prifu_plugin as prifu
from prifu_plugin.errors import ConfigError, VerificationError

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


def half_filtered(part):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), part, nn.Conv2d(8, 2, 1)
    model = prifu.wrap(nn.Sequential(*layers)).double().eval()
    prifu.filters(model)["1"].weight.data[:4] = 0.0
    return model


def test_the_page_runs_and_channels_go():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    made = {"__name__": "page"}
    exec(code, made)
    pruned, model = made["pruned"], made["model"]
    x = torch.randn(3, 3, 20, 12)
    torch.testing.assert_close(pruned(x), model(x), rtol=1e-5, atol=1e-5)
    assert pruned.get_submodule("3").in_channels == 4
    assert "no rule for Snake" not in str(prifu.report(pruned).notes)


class Scaled(nn.Module):
    """Pointwise, but for a trace that stops at values."""

    def forward(self, x):
        return x * 2 if x.sum() > 1e30 else x.square() + 1


def test_registering_makes_channels_go():
    x = torch.randn(2, 3, 8, 8).double()
    model = half_filtered(Scaled())
    before = prifu.prune(model, x)
    assert before.get_submodule("3").in_channels == 8
    assert prifu.register_pointwise(Scaled) is Scaled
    after = prifu.prune(model, x)
    assert after.get_submodule("3").in_channels == 4
    torch.testing.assert_close(after(x), model(x), rtol=0, atol=1e-11)


class Mixes(nn.Module):
    """Anything but pointwise."""

    def forward(self, x):
        return x + x.sum(1, keepdim=True).sin() + x.flip(1)


def test_a_wrong_declaration_is_refused():
    prifu.register_pointwise(Mixes)
    with pytest.raises(VerificationError, match="first at '2'|first at"):
        prifu.prune(half_filtered(Mixes()), torch.randn(2, 3, 8, 8).double())


class Kept(nn.Module):
    def forward(self, x):
        return x.relu()


def test_a_leaf_is_one_call():
    prifu.register_leaf(Kept)
    model = half_filtered(Kept())
    x = torch.randn(2, 3, 8, 8).double()
    pruned = prifu.prune(model, x)
    assert "no rule for Kept at '2'" in str(prifu.report(pruned).notes)
    torch.testing.assert_close(pruned(x), model(x), rtol=0, atol=1e-11)


@pytest.mark.parametrize("register", [prifu.register_leaf, prifu.register_pointwise])
@pytest.mark.parametrize("what", [nn.ReLU(), 3, int])
def test_what_cannot_be_registered_is_named(register, what):
    with pytest.raises(ConfigError, match="no module class"):
        register(what)
