import copy
import functools

import pytest
import torch
from torch import nn

import prifu_plugin as prifu
from prifu_plugin.errors import ConfigError, OrderError, PrifuWarning
from prifu_plugin.status import MaskHistory
from prifu_plugin.threshold import Threshold


def network():
    torch.manual_seed(0)
    model = prifu.wrap(
        nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
    )
    prifu.filters(model)["1"].weight.data = torch.linspace(0.03, 0.2, 16)
    return model


def data(count=256):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 8, generator=generator)
    return list(zip(x.split(64), (x[:, 0] > 0).long().split(64), strict=True))


def trained():
    return copy.deepcopy(trained_once())


@functools.cache
def trained_once():
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        for x, y in data():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


def test_status_counts():
    model = network()
    found = prifu.status(model)
    assert found["channels"] == 16
    assert found["open"] == found["open/1"] == 16
    prifu.filters(model)["1"].weight.data.zero_()
    assert prifu.status(model)["dead filters"] == 1
    assert all(isinstance(value, (int, float)) for value in found.values())
    with pytest.raises(OrderError):
        prifu.status(nn.Linear(2, 2))


def test_history_of_masks():
    model = network()
    history = MaskHistory(model)
    unit = prifu.filters(model)["1"]
    unit.weight.data[:3] = 0.0
    assert history.record(10)["closed now"] == 3
    unit.weight.data[0] = 0.1
    last = history.record(20)
    assert (last["closed now"], last["opened now"]) == (0, 1)
    _, axes = history.plot()
    assert axes.get_images()[0].get_array().shape == (1, 2)


def test_a_history_feeds_tensorboard_like_loggers():
    written = {}
    history = MaskHistory(network())
    for name, value in history.record(5).items():
        written[name] = float(value)
    assert written["open share"] == 1.0


def test_sweep_changes_nothing_and_agrees_with_setting_alpha():
    model = trained()
    alphas = [0.0, 0.2, 0.5, 0.9]
    with pytest.warns(PrifuWarning, match="filtered at alpha=0.1.*open nothing"):
        found = prifu.sweep(model, data(), alphas, macs=True)
    assert [one.alpha for one in found] == alphas
    assert {unit.alpha for unit in prifu.filters(model).values()} == {0.1}
    opened = [one.open_share for one in found]
    assert opened == sorted(opened, reverse=True)
    assert opened[0] > opened[-1]
    for one in found:
        prifu.filters(model)["1"].alpha = one.alpha
        right = sum((model(x).argmax(1) == y).sum().item() for x, y in data()) / 256
        assert one.score == pytest.approx(right)
        assert one.macs_share == pytest.approx(one.open_share, abs=0.01)


def test_fit_alpha_by_accuracy():
    model = trained()
    before = prifu.sweep(model, data(), [0.1])[0]
    found = prifu.fit_alpha(model, data(), max_drop=0.02)
    assert found.score >= before.score - 0.02
    assert found.alpha > 0.1
    assert {unit.alpha for unit in prifu.filters(model).values()} == {found.alpha}
    stronger = prifu.sweep(model, data(), [min(found.alpha + 0.02, 0.999)])[0]
    assert stronger.score < before.score - 0.02 or stronger.open_share == found.open_share


@pytest.mark.parametrize("budget", ["keep", "macs"])
def test_fit_alpha_by_size(budget):
    found = prifu.fit_alpha(trained(), data(), **{budget: 0.5})
    share = found.open_share if budget == "keep" else found.macs_share
    assert 0.35 < share <= 0.5
    assert isinstance(found, Threshold)


def test_thresholds_read_any_loader_once():
    class Loader:
        """Batches that can be counted and read, and nothing else."""

        def __init__(self, batches):
            self.batches = batches

        def __len__(self):
            return len(self.batches)

        def __iter__(self):
            return iter(self.batches)

    model, batches = trained(), data()
    first = prifu.sweep(model, Loader(batches), [0.1], macs=True)
    assert first == prifu.sweep(model, batches, [0.1], macs=True)


def test_bad_input():
    with pytest.raises(ConfigError, match="one budget"):
        prifu.fit_alpha(network(), data(), keep=0.5, macs=0.5)
    with pytest.raises(ConfigError, match=r"all in \[0, 1\)"):
        prifu.sweep(network(), data(), [1.0])
    with pytest.raises(ConfigError, match="empty"):
        prifu.sweep(network(), [], [0.1])
    model = trained()
    prifu.filters(model)["1"].weight.data.fill_(0.1)
    with pytest.raises(ConfigError, match="None of 12 thresholds up to 1 "):
        prifu.fit_alpha(model, data(), keep=0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 50}, "no share"),
        ({"macs": 0.0}, "no share"),
        ({"max_drop": -1}, "may fall"),
        ({"max_drop": 2}, "pass 0.02 for two percent"),
        ({"keep": 0.5, "steps": 0}, "at least 1"),
    ],
)
def test_impossible_budgets_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        prifu.fit_alpha(trained(), data(), **settings)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: iter(data()), "iterator"),
        (lambda: data()[0], "one batch"),
        (lambda: [{"x": x, "y": y} for x, y in data()], "is a dict"),
        (lambda: [(x.numpy(), y) for x, y in data()], "ndarray"),
        (lambda: [(x, y + 5) for x, y in data()], "classes: number"),
        (lambda: [(x, y.float()) for x, y in data()], "float32"),
        (lambda: [(x, y[:, None]) for x, y in data()], r"pass logits"),
    ],
)
def test_batches_that_are_no_pairs_of_tensors_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        prifu.sweep(trained(), given(), [0.2])


def test_a_metric_must_be_one_number_a_sample():
    def mean(output, target):
        return (output.argmax(1) == target).double().mean()

    with pytest.raises(ConfigError, match="one number a sample"):
        prifu.sweep(trained(), data(), [0.2], metric=mean)


def test_influence_refuses_classes_that_one_logit_has_not():
    x, net = torch.randn(4, 3), nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
    assert prifu.influence(net, x, torch.tensor([0, 1, 1, 0])).shape == x.shape
    with pytest.raises(ConfigError, match="reach from 5 to 5"):
        prifu.influence(net, x, torch.full((4,), 5))
    with pytest.raises(ConfigError, match="influence is a gradient"):
        prifu.influence(net, x.long(), torch.tensor([0, 1, 1, 0]))


def test_settings_are_plain_numbers():
    assert type(prifu.FilterConfig(alpha=torch.tensor(0.5)).alpha) is float
    assert type(prifu.dose_to_beta(1.0, torch.full((4,), 0.1))) is float
    with pytest.raises(ConfigError, match="no number"):
        prifu.FilterConfig(alpha="0.1")
    with pytest.raises(ConfigError, match="none below 0"):
        prifu.dose_to_beta(1.0, [-0.1, 0.3])


def test_a_budget_without_room_leaves_each_alpha_as_it_is():
    torch.manual_seed(0)
    layers = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8)
    model = prifu.wrap(nn.Sequential(*layers, nn.Linear(8, 2))).eval()
    first, second = prifu.filters(model).values()
    first.alpha, second.alpha = 0.0, 0.6
    with torch.no_grad():
        first.weight.copy_(torch.linspace(0.1, 1, 8))
    x = torch.randn(200, 4)
    data = [(x, model(x).argmax(1))]
    found = prifu.fit_alpha(model, data, max_drop=0.0)
    assert found.score == 1.0
    assert model(x).argmax(1).eq(data[0][1]).all()


@pytest.mark.parametrize("budget", ["keep", "macs"])
def test_a_budget_that_is_met_already_opens_nothing(budget):
    model = trained()
    before = {unit.alpha for unit in prifu.filters(model).values()}
    found = prifu.fit_alpha(model, data(), **{budget: 1.0})
    assert {unit.alpha for unit in prifu.filters(model).values()} == before == {found.alpha}


def test_a_search_that_was_too_short_says_so():
    model = prifu.wrap(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))).eval()
    prifu.filters(model)["1"].weight.data = torch.linspace(0.93, 1.0, 8)
    batches, even = [(torch.randn(64, 4), torch.zeros(64))], lambda y, _: torch.ones(len(y))
    with pytest.raises(ConfigError, match="None of 3 thresholds up to 0.887 .* pass more steps="):
        prifu.fit_alpha(model, batches, keep=0.5, steps=3, metric=even)
    assert prifu.fit_alpha(model, batches, keep=0.5, steps=12, metric=even).open_share <= 0.5
