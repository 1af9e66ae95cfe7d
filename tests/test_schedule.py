"""Schedules of filters against closed forms; statistics against averages."""

import copy

import pytest
import torch
from torch import nn

import prifu_plugin as prifu
from prifu_plugin.errors import ConfigError, FilterError, OrderError, PrifuWarning


def network(**settings):
    torch.manual_seed(0)
    layers = nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2)
    return prifu.wrap(nn.Sequential(*layers), example_inputs=torch.zeros(2, 4), **settings)


def unit_of(model):
    return prifu.filters(model)["1"]


def trained(model, schedule, optimizer, steps, first=0):
    for step in range(first, first + steps):
        g = torch.Generator().manual_seed(step)
        x = torch.randn(12, 4, generator=g)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long()).backward()
        optimizer.step()
        schedule.step()


def test_pairs_are_linear_and_stay_at_their_end():
    model = network()
    schedule = prifu.FilterSchedule(
        model, 10, alpha=(0.0, 0.2), beta=(0.1, 0.0), gain=(10.0, 1.0), until=0.5
    )
    seen = []
    for _ in range(12):
        unit = unit_of(model)
        seen.append((unit.alpha, unit.beta, unit.gain))
        assert schedule.values() == {"alpha": unit.alpha, "beta": unit.beta, "gain": unit.gain}
        schedule.step()
    for done, (alpha, beta, gain) in enumerate(seen):
        share = min(1.0, done / 5)
        expected = 0.2 * share, 0.1 - 0.1 * share, 10 - 9 * share
        assert (alpha, beta, gain) == pytest.approx(expected)


def test_functions_and_coarse_changes():
    model = network(cut="2")
    schedule = prifu.FilterSchedule(model, 7, noise=lambda share: share**2, every=3)
    cut = next(m for m in model.modules() if isinstance(m, prifu.CutFilter))
    seen = []
    for _ in range(8):
        seen.append(cut.noise)
        schedule.step()
    expected = [0, 0, 0, (3 / 7) ** 2, (3 / 7) ** 2, (3 / 7) ** 2, (6 / 7) ** 2, 1]
    assert seen == pytest.approx(expected)


def test_a_decay_that_changes_gives_the_dose_of_its_sum():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = prifu.FilterSchedule(model, 10, beta=(0.0, 1.0))
    trained(model, schedule, optimizer, 10)
    assert unit_of(model).dose == pytest.approx(0.1 * sum(step / 10 for step in range(10)))


def test_a_gain_that_falls_ends_as_the_papers_filter():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    schedule = prifu.FilterSchedule(model, 20, gain=(10.0, 1.0))
    trained(model, schedule, optimizer, 20)
    unit, x = unit_of(model), torch.randn(5, 8)
    weight = torch.where(unit.closed, 0.0, unit.weight)
    torch.testing.assert_close(unit(x), x * weight)
    pruned = prifu.prune(model.eval(), torch.zeros(2, 4))
    torch.testing.assert_close(pruned(x[:, :4]), model(x[:, :4]))


def test_resume_is_bit_equal_and_keeps_the_dose():
    def begin():
        model = network(beta=0.05)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, prifu.FilterSchedule(model, 10, alpha=(0.0, 0.5), every=2), optimizer

    whole, parts = begin(), begin()
    trained(*whole, 10)
    trained(*parts, 5)
    state = copy.deepcopy([part.state_dict() for part in parts])
    parts = begin()
    for part, one in zip(parts, state, strict=True):
        part.load_state_dict(one)
    trained(*parts, 5, first=5)
    assert unit_of(parts[0]).dose == unit_of(whole[0]).dose > 0
    assert unit_of(parts[0]).alpha == unit_of(whole[0]).alpha == 0.5
    for a, b in zip(whole[0].state_dict().values(), parts[0].state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_compiled_model_follows_its_schedule():
    model, other = network(), network()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, other)]
    schedules = [prifu.FilterSchedule(m, 6, alpha=(0.0, 0.9), every=2) for m in (model, other)]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    trained(compiled, schedules[0], optimizers[0], 6)
    trained(other, schedules[1], optimizers[1], 6)
    torch.testing.assert_close(unit_of(model).weight, unit_of(other).weight)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "Nothing is scheduled"),
        ({"alpha": (0.0, 1.0)}, "alpha=1.0 at step 8"),
        ({"alpha": lambda share: float("nan")}, "alpha=nan at step 0"),
        ({"gain": (1.0, 0.0)}, "gain=0.0"),
        ({"beta": (-1.0, 0.0)}, "beta=-1.0"),
        ({"noise": (0.0, 0.3)}, "wrap with cut="),
        ({"alpha": (0.0, 0.1), "until": 0.0}, "until"),
    ],
)
def test_impossible_schedules_change_nothing(settings, says):
    model = network()
    before = unit_of(model).alpha, unit_of(model).beta, unit_of(model).gain
    with pytest.raises(ConfigError, match=says):
        prifu.FilterSchedule(model, 8, **settings)
    assert (unit_of(model).alpha, unit_of(model).beta, unit_of(model).gain) == before


def test_models_without_filters_and_states_of_others_are_refused():
    with pytest.raises(OrderError):
        prifu.FilterSchedule(nn.Linear(2, 2), 3, alpha=(0.0, 0.1))
    schedule = prifu.FilterSchedule(network(), 3, alpha=(0.0, 0.1))
    with pytest.raises(FilterError, match="another model"):
        schedule.load_state_dict({"done": 1, "dose": {"7": 0.1}})


@pytest.mark.parametrize("kind", ["batch norm", "cut filter", "both"])
def test_statistics_are_the_average_over_batches(kind):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 1)] + [nn.BatchNorm2d(4)] * (kind != "cut filter") + [nn.ReLU()]
    model = nn.Sequential(*layers, nn.GroupNorm(2, 4))
    if kind != "batch norm":
        cut = "1" if kind == "cut filter" else "2"
        model = prifu.wrap(model, cut=cut, example_inputs=torch.rand(2, 3, 4, 4))
    holders = [m for m in model.modules() if getattr(m, "running_mean", None) is not None]
    for holder in holders:
        holder.running_mean.fill_(9.0)
    inputs = {}
    for holder in holders:
        holder.register_forward_hook(lambda m, given, _: inputs.setdefault(m, []).append(given[0]))
    batches = [(torch.rand(6, 3, 4, 4), torch.zeros(6)) for _ in range(4)]
    model.eval()
    weights = copy.deepcopy(list(model.parameters()))
    assert prifu.recalibrate(model, iter(batches)) is model
    assert not any(m.training for m in model.modules())
    assert len(holders) == (2 if kind == "both" else 1)
    for holder in holders:
        means = torch.stack([x.mean((0, 2, 3)) for x in inputs[holder]])
        assert len(means) == 4
        torch.testing.assert_close(holder.running_mean, means.mean(0))
        assert holder.momentum == 0.1
    for a, b in zip(weights, model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_norms_that_are_frozen_keep_their_statistics():
    model = prifu.wrap(
        nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    )
    model[0].eval().requires_grad_(False)
    model[0].running_mean.fill_(0.25)
    frozen = copy.deepcopy(model[0].state_dict())
    prifu.recalibrate(model, [torch.rand(4, 3, 2, 2) + 5 for _ in range(3)])
    assert all(torch.equal(value, frozen[key]) for key, value in model[0].state_dict().items())
    assert not model[0].training
    assert int(model[2].num_batches_tracked) == 3
    model.eval()  # then nothing tells frozen ones from others
    prifu.recalibrate(model, [torch.rand(4, 3, 2, 2) + 5])
    assert bool((model[0].running_mean > 5).all())


def test_no_batches_leave_statistics_alone():
    norm = nn.BatchNorm1d(2)
    norm.running_mean.fill_(3.0)
    with pytest.raises(ConfigError, match="No batches"):
        prifu.recalibrate(nn.Sequential(norm), [])
    assert norm.running_mean.tolist() == [3.0, 3.0]


def test_a_course_of_beta_is_scaled_to_a_dose():
    model = network()
    rates = [0.1 * (1 - step / 20) for step in range(20)]
    schedule = prifu.FilterSchedule(
        model, steps=20, beta=lambda share: share**2, dose=0.7, rates=rates
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=rates[0])
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        model(torch.randn(4, 4)).square().mean().backward()
        optimizer.step()
        schedule.step()
    assert unit_of(model).dose == pytest.approx(0.7)
    for settings in ({"dose": 1.0}, {"dose": 1.0, "rates": [0.1]}, {"dose": -1.0, "rates": rates}):
        with pytest.raises(ConfigError, match="dose"):
            prifu.FilterSchedule(model, steps=20, **settings)


def test_a_recalibration_that_fails_leaves_everything_as_it_was():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    before = copy.deepcopy(model.state_dict())
    for batches in ([torch.randn(8, 4), torch.randn(8, 5)], [torch.randn(8, 4), {"x": 1}]):
        with pytest.raises((RuntimeError, ConfigError)):
            prifu.recalibrate(model, batches)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert model[1].momentum == 0.1
        assert not model.training


def test_the_dose_counts_what_is_in_force():
    model = prifu.wrap(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), alpha=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    rates = [1e-4] * 10
    course = {"beta": (0.0, 1.0), "dose": 2e-3, "rates": rates}
    schedule = prifu.FilterSchedule(model, 10, every=5, **course)
    for _ in rates:
        optimizer.zero_grad()
        (model(torch.randn(8, 4)) - 1).square().mean().backward()
        optimizer.step()
        schedule.step()
    assert prifu.status(model)["dose"] == pytest.approx(2e-3)


def test_a_state_of_another_length_is_refused_and_nothing_changes():
    model = prifu.wrap(nn.Sequential(nn.BatchNorm1d(4)))
    short, long = (prifu.FilterSchedule(model, steps, alpha=(0.0, 0.2)) for steps in (10, 100))
    for _ in range(5):
        short.step()
    state = short.state_dict()
    with pytest.raises(FilterError, match="10 steps, and this one has 100"):
        long.load_state_dict(state)
    with pytest.raises(ConfigError, match="done"):
        short.load_state_dict({**state, "done": -3})
    assert (short.done, long.done) == (5, 0)
    del state["steps"]  # as states were before
    short.load_state_dict(state)


def test_a_pruned_model_keeps_the_statistics_of_its_filter_on_the_upload():
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    net = nn.Sequential(*layers, nn.Linear(8, 2))
    x = torch.rand(16, 3, 8, 8)
    wrapped = prifu.wrap(net, cut="3", example_inputs=x).eval()
    with pytest.warns(PrifuWarning, match="recalibrate the wrapped model, then prune it"):
        prifu.recalibrate(prifu.prune(wrapped, x), [x])
    prifu.recalibrate(prifu.prune(prifu.wrap(net).eval(), x), [x])


def test_a_course_that_gives_no_number_is_said():
    model = prifu.wrap(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    with pytest.raises(ConfigError, match="A course returned None for the share 0.00"):
        prifu.FilterSchedule(model, 10, alpha=lambda share: None)
    with pytest.raises(FilterError, match="not the state of a schedule"):
        prifu.FilterSchedule(model, 10, alpha=(0.0, 0.1)).load_state_dict(None)
    with pytest.raises(ConfigError, match="learning_rates is a NoneType"):
        prifu.dose_to_beta(1.0, None)
