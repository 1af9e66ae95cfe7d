"""Layers whose weights are computed, with a filter behind them: in training, and in prune."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import prifu_plugin as prifu
from prifu_plugin.errors import VerificationError
from prifu_plugin.prune import run
from prifu_plugin.prune.verify import difference

IMAGES = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Absolute(nn.Module):
    def forward(self, value):
        return value.abs()


class Normalizing(nn.Module):
    """Normalizes in its forward, with a scale of its own."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, x):
        return F.batch_norm(x, None, None, self.weight, training=True)


def network(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), norm(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
    )  # fmt: skip


COMPUTED = {
    "weight norm": lambda m: parametrizations.weight_norm(m[3]),
    "spectral norm": lambda m: parametrizations.spectral_norm(m[3]),
    "a norm's scale": lambda m: parametrize.register_parametrization(m[1], "weight", Absolute()),
    "scale and shift": lambda m: [
        parametrize.register_parametrization(m[1], name, Absolute()) for name in ("weight", "bias")
    ],
}


def closed(wrapped):
    """Close half of every filter's channels, with other scales than 1 in front of them."""
    for unit in prifu.filters(wrapped).values():
        unit.weight.data[: len(unit.weight) // 2] = 0.0
    return wrapped.eval()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", COMPUTED)
def test_pruned_with_its_filters(what, when):
    model = network()
    if when == "before":
        COMPUTED[what](model)
    wrapped = prifu.wrap(model, cut="3", example_inputs=IMAGES)
    if when == "after":
        COMPUTED[what](wrapped)
    closed(wrapped)
    pruned = prifu.prune(wrapped, IMAGES)
    assert not [text for _, text in prifu.report(pruned).notes if "rounding" in text]
    assert difference(wrapped(IMAGES), pruned(IMAGES)) < 1e-5
    assert prifu.report(pruned).parameters[1] < 0.7 * prifu.report(pruned).parameters[0]
    before, after = (prifu.split(m, "3", IMAGES).payload(IMAGES) for m in (wrapped, pruned))
    assert int(before.varying.sum()) == int(after.varying.sum()) == 6


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_noise_of_a_computed_cut_stays(noise):
    model = network()
    parametrizations.weight_norm(model[3])
    pruned = prifu.prune(
        closed(prifu.wrap(model, cut="3", noise=noise, example_inputs=IMAGES)), IMAGES
    )
    edge = prifu.split(pruned, "3", IMAGES).edge
    assert torch.equal(edge(IMAGES), edge(IMAGES)) is (noise == 0.0)


def test_made_again_with_its_filters():
    model = network()
    COMPUTED["a norm's scale"](model)
    fresh = copy.deepcopy(model)
    pruned = prifu.prune(closed(prifu.wrap(model)), IMAGES)
    again = prifu.rebuild(fresh, prifu.plan(pruned), pruned.state_dict())
    assert torch.equal(again(IMAGES), pruned(IMAGES))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_functional_norm_whose_scale_is_computed(when):
    model = network(Normalizing)
    if when == "before":
        COMPUTED["a norm's scale"](model)
    wrapped = prifu.wrap(model)
    if when == "after":
        COMPUTED["a norm's scale"](wrapped)
    pruned = prifu.prune(closed(wrapped), IMAGES)
    assert difference(wrapped(IMAGES), pruned(IMAGES)) < 1e-5
    assert pruned.get_submodule("3").in_channels == 4


@pytest.mark.parametrize("what", COMPUTED)
def test_trained_and_unwrapped_after_it_was_parametrized(what):
    wrapped = prifu.wrap(network(), cut="3", example_inputs=IMAGES)
    plain = network()
    for model in (wrapped, plain):
        torch.manual_seed(1)
        COMPUTED[what](model)
        model.train()
    assert difference(plain(IMAGES), wrapped(IMAGES)) < 1e-5
    wrapped(IMAGES).square().sum().backward()
    assert all(unit.weight.grad.abs().sum() > 0 for unit in prifu.filters(wrapped).values())
    unwrapped = prifu.unwrap(wrapped)
    assert parametrize.is_parametrized(unwrapped[1]) or parametrize.is_parametrized(unwrapped[3])
    for model in (plain, unwrapped):
        model.eval()
        for layer in model.modules():
            if parametrize.is_parametrized(layer):
                for name in list(layer.parametrizations):
                    parametrize.remove_parametrizations(layer, name)
    assert not any(parametrize.is_parametrized(layer) for layer in unwrapped.modules())


def test_what_goes_wrong_before_capture_is_no_rounding(monkeypatch):
    plain_layers = run.plain_layers

    def wrong(model):
        plain_layers(model)[3].weight.data[0] *= 1.5
        return model

    monkeypatch.setattr(run, "plain_layers", wrong)
    with pytest.raises(VerificationError, match="differs"):
        prifu.prune(closed(prifu.wrap(network())), IMAGES)


class NormalizedLinear(nn.Linear):
    def forward(self, x):
        return F.layer_norm(super().forward(x), (self.out_features,))


class StandardizedLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, F.layer_norm(self.weight, (self.in_features,)), self.bias)


@pytest.mark.parametrize("around", [False, True])
def test_a_layer_that_normalizes_what_it_returns_gets_a_filter(around):
    inside = NormalizedLinear(6, 8)
    model = nn.Sequential(inside, nn.ReLU(), nn.Linear(8, 3)) if around else inside
    wrapped = prifu.wrap(model)
    (path,) = prifu.filters(wrapped)
    assert path == ("0.layer_norm" if around else "layer_norm")
    closed(wrapped)
    x = torch.randn(5, 6)
    pruned = prifu.prune(wrapped, x)
    assert difference(wrapped(x), pruned(x)) < 1e-5
    if around:
        assert pruned.get_submodule("2").in_features == 4


def test_a_layer_that_normalizes_its_weight_gets_none():
    model = nn.Sequential(StandardizedLinear(6, 8), nn.LayerNorm(8))
    assert list(prifu.filters(prifu.wrap(model))) == ["1"]
