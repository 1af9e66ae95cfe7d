"""Layers whose weights are computed, with a filter behind them: in training, and in prune."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import prifu_plugin as prifu
from prifu_plugin.errors import OrderError, VerificationError
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


def with_filters(what, when):
    """Wrap a network with computed weights, or compute them once it is wrapped."""
    model = network()
    if when == "before":
        COMPUTED[what](model)
    wrapped = prifu.wrap(model, cut="3", example_inputs=IMAGES)
    if when == "after":
        COMPUTED[what](wrapped)
    return closed(wrapped)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", COMPUTED)
def test_pruned_with_its_filters(what, when):
    wrapped = with_filters(what, when)
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
    plain(IMAGES)
    wrapped(IMAGES).square().sum().backward()
    assert all(unit.weight.grad.abs().sum() > 0 for unit in prifu.filters(wrapped).values())
    unwrapped = prifu.unwrap(wrapped)
    assert parametrize.is_parametrized(unwrapped[1]) or parametrize.is_parametrized(unwrapped[3])
    for model in (plain, unwrapped):
        model.eval()
    assert difference(plain(IMAGES), unwrapped(IMAGES)) < 1e-6
    without_parametrizations(unwrapped)
    assert difference(plain(IMAGES), unwrapped(IMAGES)) < 1e-6


def without_parametrizations(model):
    for layer in list(model.modules()):
        if parametrize.is_parametrized(layer):
            for name in list(layer.parametrizations):
                parametrize.remove_parametrizations(layer, name)
    assert not any(parametrize.is_parametrized(layer) for layer in model.modules())


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", COMPUTED)
def test_what_is_computed_may_change_after_wrap(what, when):
    wrapped = with_filters(what, when)
    expected = wrapped(IMAGES)
    host = next(layer for layer in wrapped.modules() if parametrize.is_parametrized(layer))
    if "bias" not in host.parametrizations:
        parametrize.register_parametrization(host, "bias", Absolute())
        assert wrapped(IMAGES).shape == expected.shape
        parametrize.remove_parametrizations(host, "bias", leave_parametrized=False)
    else:
        parametrize.remove_parametrizations(host, "bias")
    assert difference(expected, wrapped(IMAGES)) < 1e-5
    without_parametrizations(wrapped)
    assert difference(expected, wrapped(IMAGES)) < 1e-5
    pruned = prifu.prune(wrapped, IMAGES)
    assert difference(expected, pruned(IMAGES)) < 1e-5
    assert prifu.report(pruned).parameters[1] < 0.7 * prifu.report(pruned).parameters[0]


def test_a_class_that_others_derive_with_one_of_their_own_keeps_both():
    """As FSDP2 does, whose class comes first."""

    class Sharded:
        pass

    wrapped = prifu.wrap(network(), cut="3", example_inputs=IMAGES)
    expected = wrapped(IMAGES)
    for place in (1, 3):
        cls = type(wrapped[place])
        wrapped[place].__class__ = type("FSDP" + cls.__name__, (Sharded, cls), {})
    assert torch.equal(wrapped(IMAGES), expected)
    assert isinstance(prifu.unwrap(wrapped, inplace=True)[1], Sharded)


def test_a_scale_that_was_absorbed_and_is_computed_since():
    wrapped = prifu.wrap(network(), bias=True)
    prifu.absorb(wrapped)
    COMPUTED["a norm's scale"](wrapped)
    with pytest.raises(OrderError, match="remove_parametrizations"):
        prifu.unwrap(wrapped)


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


class Product(nn.Module):
    def __init__(self, first):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.norm = nn.LayerNorm(8)
        self.first = first

    def forward(self, x):
        return self.norm(x @ self.weight) if self.first else self.norm(x) @ self.weight


@pytest.mark.parametrize("width", [3, 8])
@pytest.mark.parametrize("first", [False, True])
def test_a_product_inside_a_container(first, width):
    torch.manual_seed(0)
    model = nn.Sequential(Product(first), nn.ReLU(), nn.Linear(8, width))
    wrapped = closed(prifu.wrap(model))
    x = torch.randn(4, 8)
    pruned = prifu.prune(wrapped, x)
    assert difference(wrapped(x), pruned(x)) < 1e-5
    assert pruned.get_submodule("2").in_features == (4 if first else 8)


class Chain(nn.Sequential):
    """A container that multiplies by a parameter behind what it runs."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return super().forward(x) @ self.weight


@pytest.mark.parametrize("around", [False, True])
def test_a_container_that_multiplies(around):
    torch.manual_seed(0)
    chain = Chain(nn.Linear(8, 8), nn.LayerNorm(8))
    wrapped = closed(prifu.wrap(nn.Sequential(chain, nn.ReLU()) if around else chain))
    x = torch.randn(4, 8)
    pruned = prifu.prune(wrapped, x)
    assert difference(wrapped(x), pruned(x)) < 1e-5
    assert prifu.report(pruned).parameters[1] < prifu.report(pruned).parameters[0]


class Sensitive(nn.Module):
    """Holds a table in fp32 that no copy casts, and rounds to more than is allowed."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.LayerNorm(97), nn.Linear(97, 4)
        self.table = np.random.default_rng(0).normal(size=(97, 97)).astype(np.float32)

    def forward(self, x):
        return torch.sin(30 * self.head(self.norm(x) @ torch.from_numpy(self.table)))


def test_rounding_of_a_model_that_python_does_not_run_in_fp64():
    torch.manual_seed(0)
    wrapped = closed(prifu.wrap(Sensitive()))
    x = torch.randn(64, 97)
    check = prifu.report(prifu.prune(wrapped, x)).checks[-1]
    assert check.dtype == "float32"
    assert check.rounding > 1e-5
