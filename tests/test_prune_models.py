"""The contract of prune over whole architectures: exact, small, plain, rebuilt without pickle."""

import copy
import json

import probe
import pytest
import torch
import zoo
from torch import fx

import prifu_plugin as prifu


def least_saved(name, bias):
    """The share of what could be saved that must be saved."""
    if bias and name in zoo.DEPTHWISE:
        return 0.80
    if name in zoo.GROUPED:
        return 0.90
    return 0.97


def check(name, bias):
    size = zoo.image_size(name)
    wrapped = zoo.half_off(prifu.wrap(zoo.build(name), bias=bias))
    before = copy.deepcopy(wrapped.state_dict())
    pruned = prifu.prune(wrapped, torch.zeros(1, 3, size, size))
    assert all(torch.equal(before[key], value) for key, value in wrapped.state_dict().items())
    report = prifu.report(pruned)
    for one in report.checks:
        assert one.difference <= (1e-11 if one.dtype == "float64" else 1e-5)
    for shape in [(2, 3, size, size)]:  # and once with a yardstick of our own
        x = torch.randn(shape)
        expected, found = wrapped(x), pruned(x)
        assert (expected - found).abs().max() <= 1e-5 * expected.abs().max()
    total = probe.macs(wrapped, (1, 3, size, size))
    assert report.macs == (total, probe.macs(pruned, (1, 3, size, size)))
    assert_plain(pruned)
    text = json.dumps(json.loads(prifu.plan(pruned).to_json()))
    again = prifu.rebuild(zoo.build(name), text, pruned.state_dict())
    assert torch.equal(again(x), pruned(x))
    zoo.measure_statistics(wrapped, size)
    if not torch.equal(wrapped(x), expected):  # a model without BatchNorm is what it was
        report = prifu.report(prifu.prune(wrapped, torch.zeros(1, 3, size, size)))
    bound = probe.least_share(copy.deepcopy(wrapped).double(), (3, size, size))
    assert report.saved >= least_saved(name, bias) * (1 - bound), (report.saved, 1 - bound)


def assert_plain(pruned):
    assert isinstance(pruned, fx.GraphModule)
    for module in pruned.modules():
        assert not type(module).__module__.startswith("prifu_plugin")
        assert not hasattr(type(module), "_prifu_base")
    assert not any("prifu" in key for key in pruned.state_dict())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", zoo.SMALL)
def test_small_models(name, bias):
    check(name, bias)


def cases():
    """Return every model without and with biases; with them, one of each family before others."""
    for name in zoo.ALL:
        for bias in (False, True) if name not in zoo.SMALL else ():
            later = (name, bias) in zoo.LATER or (bias and name not in zoo.WITH_BIAS)
            yield pytest.param(name, bias, marks=pytest.mark.long if later else ())


@pytest.mark.zoo
@pytest.mark.parametrize(("name", "bias"), list(cases()))
def test_models(name, bias):
    check(name, bias)


def test_train_and_eval_graphs_that_differ():
    model = zoo.build("tv_googlenet")
    wrapped = prifu.wrap(model)
    paths = set(prifu.filters(wrapped))
    assert any(path.startswith("aux1") for path in paths)
    wrapped.train()
    outputs = wrapped(torch.randn(2, 3, 64, 64))
    sum(o.sum() for o in outputs).backward()
    assert all(unit.weight.grad is not None for unit in prifu.filters(wrapped).values())
    pruned = prifu.prune(wrapped, torch.zeros(1, 3, 64, 64))
    assert not any(name.startswith("aux") for name, _ in pruned.named_modules())
    assert wrapped.training
