"""Arguments that cannot be right: each is refused at the edge, by name, with what to type."""

import json

import pytest
import torch
from torch import nn

import prifu_plugin as prifu
from prifu_plugin.channel import Channel, Noise
from prifu_plugin.errors import ConfigError, FilterError, OrderError


def network():
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 2))


X = torch.randn(2, 3, 8, 8)
HUGE = torch.tensor([[1e300]], dtype=torch.float64)
DATA = [(X, torch.tensor([0, 1]))]


@pytest.fixture(scope="module")
def wrapped():
    return prifu.wrap(network()).eval()


@pytest.fixture(scope="module")
def pruned(wrapped):
    return prifu.prune(wrapped, X)


@pytest.mark.parametrize(
    "call",
    [
        prifu.wrap,
        prifu.unwrap,
        prifu.filters,
        prifu.sites,
        prifu.status,
        prifu.summary,
        prifu.absorb,
        prifu.report,
        prifu.plan,
        prifu.cut_points,
        lambda m: prifu.prune(m, X),
        lambda m: prifu.split(m, "0", X),
        lambda m: prifu.recalibrate(m, [X]),
        lambda m: prifu.relevance(m, DATA),
        lambda m: prifu.influence(m, *DATA[0]),
        lambda m: prifu.sweep(m, DATA, [0.1]),
    ],
)
def test_what_is_no_module(call):
    with pytest.raises(ConfigError, match=r"pass a torch\.nn\.Module"):
        call(None)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: prifu.wrap(network(), include=5), "include holds 5"),
        (lambda m: prifu.wrap(network(), exclude=[5]), "exclude holds 5"),
        (lambda m: prifu.wrap(network(), bias="yes"), "bias='yes'"),
        (lambda m: prifu.wrap(network(), example_inputs=X.numpy()), "example_inputs is a ndarray"),
        (lambda m: prifu.wrap(network(), example_inputs=3), "example_inputs is 3"),
        (lambda m: prifu.wrap(network(), example_inputs=X, cut="2", cut_dim="1"), "cut_dim='1'"),
        (lambda m: prifu.split(m, "2", X).payload(X, dim=7), "dim=7"),
        (lambda m: prifu.recalibrate(m, X), "one tensor"),
        (lambda m: prifu.sweep(m, DATA, [True]), "alphas=True"),
        (lambda m: setattr(prifu.PriFU(2), "gain", 0), "gain=0 is not above 0"),
        (lambda m: setattr(prifu.PriFU(2), "gain", "a"), "gain='a' is no number"),
        (lambda m: prifu.register_norm(nn.Softmax, dim="1"), "dim='1'"),
        (lambda m: Channel(3), "int is no step"),
        (lambda m: Channel(nn.Identity()), "Identity is no step"),
        (lambda m: Noise("a", key=bytes(32)), "scale='a' is no number"),
        (lambda m: Channel().encode(HUGE), "infinite as fp32"),
        (lambda m: prifu.wrap(network(), exclude="1"), r"pass exclude=\['1'\]"),
        (lambda m: prifu.wrap(network(), cut=5), "cut=5"),
        (lambda m: prifu.split(m, 5, X), "at=5"),
        (lambda m: prifu.prune(m, X, round_to="8"), "round_to='8' is no whole number"),
        (lambda m: prifu.prune(m, X, round_to=True), "round_to=True is no whole number"),
        (lambda m: prifu.prune(m, X, round_to=0), "at least 1"),
        (lambda m: prifu.prune(m, X, move_cost="a"), "move_cost='a'"),
        (lambda m: prifu.prune(m, X, seed="a"), "seed='a'"),
        (lambda m: prifu.prune(m, {"x": X}), "example_inputs is a dict"),
        (lambda m: prifu.sweep(m, DATA, [0.1], metric="accuracy"), "metric is 'accuracy'"),
        (lambda m: prifu.sweep(m, None, [0.1]), "data is a NoneType"),
        (lambda m: prifu.fit_alpha(m, DATA, keep="a"), "keep='a'"),
        (lambda m: prifu.fit_alpha(m, DATA, max_drop="a"), "max_drop='a'"),
        (lambda m: prifu.fit_alpha(m, DATA, keep=0.5, steps=0), "steps=0"),
        (lambda m: prifu.relevance(m, None), "data is a NoneType"),
        (lambda m: prifu.relevance(m, DATA, loss=3), "loss is 3"),
        (lambda m: prifu.influence(m, None, None), "pass tensors"),
        (lambda m: prifu.influence(m, *DATA[0], nn.functional.cross_entropy), "one loss a sample"),
        (lambda m: prifu.recalibrate(m, None), "batches is a NoneType"),
        (lambda m: prifu.FilterSchedule(m, "10", alpha=(0, 0.1)), "steps='10'"),
        (lambda m: prifu.FilterSchedule(m, 1.5, alpha=(0, 0.1)), "steps=1.5"),
        (lambda m: prifu.FilterSchedule(m, 10, alpha=0.1), "pass a pair"),
        (lambda m: prifu.FilterSchedule(m, 10, alpha=("a", 0.1)), "alpha='a' is no number"),
        (lambda m: prifu.FilterSchedule(m, 10, alpha=(0, 0.1), until=2), "until=2"),
        (lambda m: prifu.FilterSchedule(m, 2, dose=1.0, rates=0.1), "needs rates="),
        (lambda m: prifu.FilterSchedule(m, 2, dose="a", rates=[0.1, 0.1]), "dose='a'"),
        (lambda m: prifu.dose_to_beta("a", [0.1]), "dose='a'"),
        (lambda m: prifu.dose_to_beta(1.0, ["a"]), "learning_rates='a'"),
        (lambda m: prifu.PriFU(0), "num_features=0"),
        (lambda m: prifu.learned(torch.randn(3, 2), [0, 1, 1]), "targets are a list"),
    ],
)
def test_it_is_named(wrapped, call, said):
    with pytest.raises(ConfigError, match=said):
        call(wrapped)


def test_a_pruned_model_is_pruned(pruned):
    with pytest.raises(OrderError, match="pruned already"):
        prifu.prune(pruned, X)


def damaged(plan):
    data = json.loads(plan.to_json())
    del data["nodes"][0]["name"]
    return json.dumps(data)


def changed(plan, **to):
    return json.dumps(json.loads(plan.to_json()) | to)


@pytest.mark.parametrize(
    "to",
    [
        {"format": "1"},
        {"format": None},
        {"recipe": None},
        {"recipe": {}},
        {"recipe": {"config": {"zzz": 1}, "paths": [], "cut": None}},
        {"recipe": {"config": {}, "paths": 3, "cut": None}},
        {"nodes": []},
    ],
)
def test_plans_that_are_damaged(pruned, to):
    with pytest.raises(ConfigError, match="plan is damaged"):
        prifu.rebuild(network(), changed(prifu.plan(pruned), **to), pruned.state_dict())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda plan, state: ("{", state), "not the text"),
        (lambda plan, state: ("{}", state), "has no 'recipe'"),
        (lambda plan, state: (None, state), "plan is a NoneType"),
        (lambda plan, state: (plan, None), "state_dict is a NoneType"),
        (lambda plan, state: (plan, {}), "not of the model this plan made"),
        (lambda plan, state: (plan, {"model": state}), "holds a .*Dict at 'model'"),
        (lambda plan, state: (damaged(plan), state), "plan is damaged: KeyError 'name'"),
    ],
)
def test_what_rebuild_is_given(pruned, change, said):
    plan, state = change(prifu.plan(pruned), pruned.state_dict())
    with pytest.raises(ConfigError, match=said):
        prifu.rebuild(network(), plan, state)


def test_the_state_of_something_else(wrapped):
    with pytest.raises(FilterError, match="state of a schedule"):
        prifu.FilterSchedule(wrapped, 10, alpha=(0, 0.1)).load_state_dict({})


def test_reports_that_are_damaged(pruned):
    report = prifu.report(pruned)
    for data in ({}, {**report.to_dict(), "checks": [{}]}, {**report.to_dict(), "layers": 3}):
        with pytest.raises(ConfigError, match="report of prune is damaged"):
            type(report).from_dict(data)


def test_rebuild_where_and_from_what_it_may(pruned):
    with torch.device("meta"):
        empty = network()
    with pytest.raises(OrderError, match="meta device"):
        prifu.rebuild(empty, prifu.plan(pruned), pruned.state_dict())
    fresh = network()
    with torch.inference_mode():
        again = prifu.rebuild(fresh, prifu.plan(pruned), pruned.state_dict())
    assert torch.equal(again(X), pruned(X))
    assert not next(again.parameters()).is_inference()


def test_a_channel_with_a_key_sends_in_eval_mode_alone():
    channel = Channel(Noise(0.3, key=bytes(32)))
    with pytest.raises(OrderError, match="call its eval"):
        channel.encode(torch.zeros(1, 2))
    assert channel.eval().encode(torch.zeros(1, 2)) == channel.encode(torch.zeros(1, 2))


def test_patterns_may_come_from_a_generator():
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    net = nn.Sequential(*layers)
    assert list(prifu.filters(prifu.wrap(net, exclude=(p for p in ["1"])))) == ["3"]
    assert list(prifu.filters(prifu.wrap(net, include=(p for p in ["1"])))) == ["1"]


def test_numbers_beyond_every_float():
    with pytest.raises(ConfigError, match="is no number"):
        prifu.PriFU(4).gain = 10**400


def test_the_noise_of_a_cut_is_checked_when_it_is_set():
    x = torch.randn(4, 3, 8, 8)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    cut = prifu.wrap(net, cut="2", noise=0.3, example_inputs=x).get_submodule("2.prifu")
    for odd in (-1, float("nan"), "much"):
        with pytest.raises(ConfigError, match="noise"):
            cut.noise = odd
    assert cut.noise == 0.3


def test_searches_and_measurements_of_no_length(wrapped):
    with pytest.raises(ConfigError, match="rounds='a'"):
        prifu.fastest(wrapped, torch.zeros(1, 3, 8, 8), rounds="a")
    with pytest.raises(ConfigError, match="pair of round_to"):
        prifu.fastest(wrapped, torch.zeros(1, 3, 8, 8), ways=[])
