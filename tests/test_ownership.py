"""Filters that would stay untrained, be trained twice, or be lost on the way: refused, or kept."""

import copy
import gc
import weakref

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import prifu_plugin as prifu
from prifu_plugin.errors import ConfigError, FilterError, OrderError, PrifuWarning
from prifu_plugin.ownership import steps_of

RATE = 0.1


def network(**settings):
    torch.manual_seed(0)
    layers = nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2)
    return prifu.wrap(nn.Sequential(*layers), **{"beta": 0.2, "alpha": 0.5, **settings})


def loss_of(model, step=0):
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
    return nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long())


def train(model, optimizer, steps=60, after=lambda: None):
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        after()
    return model


def unit_of(model):
    return prifu.filters(model)["1"]


# What is filtered stays filtered.


@pytest.mark.parametrize("kind", ["ModelEmaV3", "EMA", "SWA", "SWA with buffers"])
def test_what_is_filtered_in_the_live_model_is_filtered_in_its_average(kind):
    model = network()
    makers = {
        "ModelEmaV3": lambda: ModelEmaV3(model, decay=0.9998),
        "EMA": lambda: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999)),
        "SWA": lambda: AveragedModel(model),
        "SWA with buffers": lambda: AveragedModel(
            model, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=True
        ),
    }
    average = makers[kind]()
    update = average.update if kind == "ModelEmaV3" else average.update_parameters
    train(model, torch.optim.SGD(model.parameters(), lr=RATE), after=lambda: update(model))
    live, mean = unit_of(model), unit_of(average.module)
    assert 0 < int(live.closed.sum()) < 8
    assert not (live.closed & mean.open).any()
    assert (mean.weight[live.closed] > 0).any()  # by the mask, not by W
    pruned = prifu.prune(average.module.eval(), torch.zeros(2, 4))
    x = torch.randn(3, 4)
    torch.testing.assert_close(pruned(x), average.module(x))


def test_lbfgs_revives_nothing():
    model = network(beta=0.05)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)
    step = 0

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        return loss

    closed = torch.zeros(8, dtype=torch.bool)
    for step in range(8):  # noqa: B007 - the closure reads it
        optimizer.step(closure)
        assert not (closed & unit_of(model).open).any()
        assert not unit_of(model).weight[unit_of(model).closed].any()
        closed = unit_of(model).closed
    assert closed.any()


def test_the_user_may_reopen_a_channel():
    model = network()
    train(model, torch.optim.SGD(model.parameters(), lr=RATE))
    unit = unit_of(model)
    channel = int(unit.closed.nonzero()[0])
    unit.weight.data[channel] = unit.weight.max()
    assert unit.closed[channel]
    unit.filtered[channel] = 0
    assert unit.open[channel]


def test_an_alpha_lowered_in_mid_run_is_named():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    train(model, optimizer)
    unit_of(model).alpha = 0.1
    with pytest.warns(prifu.errors.PrifuWarning, match="lowered from 0.5 to 0.1"):
        train(model, optimizer, steps=1)
    train(model, optimizer, steps=1)  # once


# What a checkpoint holds.


@pytest.mark.parametrize("copied", [False, True])
def test_an_alpha_lowered_below_that_of_a_checkpoint_is_named(copied):
    trained = network()
    train(trained, torch.optim.SGD(trained.parameters(), lr=RATE))
    model = copy.deepcopy(trained) if copied else network()
    model.load_state_dict(trained.state_dict())
    unit_of(model).alpha = 0.1
    with pytest.warns(PrifuWarning, match="lowered from 0.5 to 0.1"):
        train(model, torch.optim.SGD(model.parameters(), lr=RATE), 1)


def test_an_alpha_that_falls_for_long_is_named_once():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    train(model, optimizer)
    schedule = prifu.FilterSchedule(model, 20, alpha=(0.5, 0.0))
    with pytest.warns(PrifuWarning, match="lowered from") as said:
        train(model, optimizer, 20, schedule.step)
    assert len(said) == 1


def test_alpha_gain_and_dose_are_in_a_checkpoint():
    model = network()
    train(model, torch.optim.SGD(model.parameters(), lr=RATE))
    unit = unit_of(model)
    unit.alpha, unit.gain = 0.7, 1.5
    fresh = network(alpha=0.1, preserve=False)
    fresh.load_state_dict(model.state_dict())
    again = unit_of(fresh)
    assert (again.alpha, again.gain, again.dose) == (0.7, 1.5, unit.dose)
    x = torch.randn(5, 4)
    assert torch.equal(model(x), fresh(x))
    assert all(isinstance(value, torch.Tensor) for value in model.state_dict().values())


def test_checkpoints_of_other_versions():
    model = network()
    old = {
        k: v
        for k, v in train(network(), torch.optim.SGD(model.parameters(), lr=RATE), 0)
        .state_dict()
        .items()
        if not k.endswith(("_extra_state", "filtered"))
    }
    unit_of(model).filtered[0] = 1
    model.load_state_dict(old)
    assert not unit_of(model).filtered.any()
    later, unit = dict(model.state_dict()), unit_of(model)
    before = unit.alpha, unit.gain, unit.dose
    for said in ([9.0, 0.7, 3.0, 1.0], [9.0, 0.7, 3.0, 1.0, 7.0], [9.0]):
        later["1.prifu._extra_state"] = torch.tensor(said)
        with pytest.raises(FilterError, match="format 9"):
            model.load_state_dict(later)
        assert (unit.alpha, unit.gain, unit.dose) == before


def test_a_filter_state_that_is_none_is_refused():
    model = network()
    for said in (torch.zeros(0), torch.tensor([2.0, 0.1]), torch.tensor(2.0)):
        with pytest.raises(FilterError, match="damaged"):
            model.load_state_dict({**model.state_dict(), "1.prifu._extra_state": said})


def test_the_filter_on_the_upload_refuses_a_later_version():
    layers = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()
    x = torch.zeros(2, 3, 4, 4)
    model = prifu.wrap(nn.Sequential(*layers), cut="2", noise=0.3, example_inputs=x)
    for said, why in (([9.0, 1.0, 0.1], "format 9"), ([1.0, 1.0], "damaged"), ([], "damaged")):
        state = {**model.state_dict(), "2.prifu._extra_state": torch.tensor(said)}
        with pytest.raises(FilterError, match=why):
            model.load_state_dict(state)


def test_averages_follow_a_schedule():
    model = network()
    average = ModelEmaV3(model, decay=0.5)
    schedule = prifu.FilterSchedule(
        model, steps=4, gain=(10.0, 1.0), alpha=(0.0, 0.5), also=[average.module]
    )
    for _ in range(4):
        schedule.step()
        average.update(model)
    assert (unit_of(average.module).gain, unit_of(average.module).alpha) == (1.0, 0.5)


# Who trains them.


def test_two_optimizers_that_share_filters():
    model = network()
    first, second = (torch.optim.SGD(model.parameters(), lr=RATE) for _ in range(2))
    train(model, first, 2)
    train(model, second, 2)  # a new stage of training
    with pytest.raises(OrderError, match="in turn"):
        train(model, first, 1)


def test_a_leftover_optimizer_does_not_hide_that_filters_are_untrained():
    model = network()
    leftover = torch.optim.Adam(model.parameters())
    others = [p for name, p in model.named_parameters() if "prifu" not in name]
    optimizer = torch.optim.SGD(others, lr=RATE)
    with pytest.warns(PrifuWarning, match="has not made a step"):
        train(model, optimizer, 3)
    del leftover


def test_two_optimizers_with_a_share_each():
    model = network()
    split = {True: [], False: []}
    for name, parameter in model.named_parameters():
        split["prifu" in name].append(parameter)
    parts = [torch.optim.SGD(split[key], lr=RATE) for key in (False, True)]
    for step in range(3):
        model.zero_grad()
        loss_of(model, step).backward()
        for optimizer in parts:
            optimizer.step()
    assert unit_of(model).dose == pytest.approx(3 * RATE * 0.2)


def test_an_optimizer_on_the_head_alone_built_before_wrap():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(net[3].parameters(), lr=RATE)
    model = prifu.wrap(net, inplace=True)
    with pytest.raises(OrderError, match="no optimizer"):
        train(model, optimizer, 1)


@pytest.mark.parametrize("compiled", [False, True])
def test_an_optimizer_built_before_a_part_was_wrapped_is_an_error(compiled):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    net[0] = prifu.wrap(net[0])  # a copy: the optimizer has what it was made from, and the head
    with pytest.raises(OrderError, match="built before wrap"):
        train(torch.compile(net, backend="eager") if compiled else net, optimizer, 3)


def test_a_plain_model_that_is_partly_frozen_may_be_trained_beside_its_wrapped_copy():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    wrapped = prifu.wrap(plain)
    plain[1].requires_grad_(False)
    mine, own = (torch.optim.SGD(m.parameters(), lr=RATE) for m in (wrapped, plain))
    for step in range(4):
        for model, optimizer in ((wrapped, mine), (plain, own)):
            optimizer.zero_grad()
            loss_of(model, step).backward()
        for optimizer in (own, mine):
            optimizer.step()
    assert unit_of(wrapped).dose > 0


def test_a_plain_model_may_be_trained_by_closures_beside_its_wrapped_copy():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    wrapped = prifu.wrap(plain)
    loss_of(wrapped).backward()  # gradients that nobody has stepped with yet
    optimizer = torch.optim.LBFGS(plain.parameters(), max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(plain)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)


def test_models_side_by_side_do_not_mind_each_other():
    one, other = network(), network()
    optimizers = [torch.optim.SGD(model.parameters(), lr=RATE) for model in (one, other)]
    for step in range(2):
        for model in (one, other):
            loss_of(model, step).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert [unit_of(model).dose for model in (one, other)] == pytest.approx([2 * RATE * 0.2] * 2)


def test_a_closure_that_makes_its_gradients_is_checked_at_its_first_step():
    model = network()
    others = [p for name, p in model.named_parameters() if "prifu" not in name]
    optimizer = torch.optim.SGD(others, lr=RATE)

    def closure():
        model.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    with pytest.raises(OrderError, match="no optimizer"):
        optimizer.step(closure)


def test_a_replaced_weight_is_an_orphan():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    train(model, optimizer, 1)
    unit_of(model).weight = nn.Parameter(torch.ones(8))
    with pytest.raises(OrderError, match="replaced"):
        train(model, optimizer, 1)


# What is refused before it does harm.


@pytest.mark.parametrize("where", ["weight", "gradient"])
def test_what_is_not_finite_is_refused_before_the_step(where):
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    train(model, optimizer, 2)
    loss_of(model).backward()
    if where == "weight":
        unit_of(model).weight.data[2] = float("nan")
    else:
        unit_of(model).weight.grad[2] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FilterError, match="channel 2" if where == "weight" else "gradient"):
        optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], equal_nan=True)


@pytest.mark.parametrize(
    ("name", "value"), [("alpha", 1.0), ("alpha", float("nan")), ("alpha", -1), ("beta", -1.0)]
)
def test_settings_out_of_range(name, value):
    unit = unit_of(network())
    with pytest.raises(ConfigError, match=name):
        setattr(unit, name, value)


def test_a_layer_whose_weights_have_all_gone_is_named_once():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    unit_of(model).weight.data.zero_()
    with pytest.warns(PrifuWarning, match="'1' are closed") as caught:
        train(model, optimizer, 3)
    assert len([w for w in caught if "are closed" in str(w.message)]) == 1


def test_a_step_that_fails_in_its_middle_leaves_nothing_behind():
    class Failing(torch.optim.SGD):
        fails = True

        def step(self, closure=None):
            if self.fails:
                raise MemoryError("like an allocation that fails")
            return super().step(closure)

    model = network()
    optimizer = Failing(model.parameters(), lr=RATE, weight_decay=0.1)
    loss_of(model).backward()
    with pytest.raises(MemoryError):
        optimizer.step()
    assert len(optimizer.state_dict()["param_groups"]) == 1
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    train(model, torch.optim.SGD(model.parameters(), lr=RATE), 1)


def test_casting_rounds_no_weight():
    model = network()
    unit = unit_of(model)
    unit.weight.data = torch.tensor([0.1, 0.0500001, 0.2, 0.1001, 0.09, 0.0999, 0.15, 0.19])
    before, closed = unit.weight.detach().clone(), unit.closed
    model.bfloat16()
    assert unit.weight.dtype == torch.float32
    assert torch.equal(unit.weight, before)
    assert torch.equal(unit.closed, closed)


# Wrapped too late for what stands around the model.


@pytest.mark.parametrize("kind", ["ModelEmaV3", "AveragedModel", "compiled", "DataParallel"])
@pytest.mark.parametrize("inplace", [False, True])
def test_what_was_made_around_the_model_before_wrap_is_named(kind, inplace):
    plain = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    makers = {
        "ModelEmaV3": lambda: ModelEmaV3(plain),
        "AveragedModel": lambda: AveragedModel(plain),
        "compiled": lambda: torch.compile(plain, backend="eager"),
        "DataParallel": lambda: nn.DataParallel(plain),
    }
    around = makers[kind]()
    name = type(around).__name__
    with pytest.warns(PrifuWarning, match=f"A {name} of this Sequential was made before wrap"):
        prifu.wrap(plain, inplace=inplace)


def test_an_average_of_another_model_is_none_of_ours():
    average = AveragedModel(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)))
    prifu.wrap(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)))
    assert average is not None


def test_an_average_of_a_model_with_the_same_stem_is_none_of_ours():
    other, model = (
        nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)) for _ in range(2)
    )
    model[0].load_state_dict(other[0].state_dict())
    average = AveragedModel(other)
    prifu.wrap(model)
    assert average is not None


def test_the_plain_model_may_be_trained_beside_a_copy_with_several_filters():
    torch.manual_seed(0)
    layers = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2)
    plain = nn.Sequential(*layers)
    wrapped = prifu.wrap(plain)
    loss_of(wrapped).backward()  # gradients that nobody steps with
    train(plain, torch.optim.SGD(plain.parameters(), lr=RATE), steps=3)


def test_the_plain_model_may_be_trained_beside_its_wrapped_copy():
    plain = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    wrapped = prifu.wrap(plain)
    train(wrapped, torch.optim.SGD(wrapped.parameters(), lr=RATE), steps=2)
    loss_of(wrapped).backward()
    train(plain, torch.optim.SGD(plain.parameters(), lr=RATE), steps=2)
    assert unit_of(wrapped).dose == pytest.approx(2 * RATE * unit_of(wrapped).beta)


@pytest.mark.parametrize("zeroing", [None, True, False])
def test_a_stale_optimizer_with_gradients_of_before_is_an_error(zeroing):
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    train(model, optimizer, steps=1)
    model = prifu.wrap(model)

    def step():
        model.zero_grad()
        if zeroing is not None:
            optimizer.zero_grad(set_to_none=zeroing)
        loss_of(model).backward()
        optimizer.step()

    def steps():
        for _ in range(2):
            step()

    with pytest.raises(OrderError, match="before wrap"):
        steps()


def test_an_average_that_cannot_be_compared_is_passed_over():
    lazy = nn.Sequential(nn.LazyLinear(8), nn.LayerNorm(8))
    averages = [AveragedModel(lazy)]
    prifu.wrap(lazy)

    class Extra(nn.Sequential):
        def get_extra_state(self):
            return {"epoch": 1}

        def set_extra_state(self, state):
            pass

    extra = Extra(nn.Linear(4, 8), nn.LayerNorm(8))
    averages.append(AveragedModel(extra))
    with pytest.warns(PrifuWarning, match="made before wrap"):
        prifu.wrap(extra)


def test_ids_of_filters_that_are_gone_are_forgotten():
    from prifu_plugin.ownership import _WAITING, check_ownership

    torch.manual_seed(0)
    model, other = network(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    gone = prifu.PriFU(3)
    _WAITING[optimizer] = {id(unit_of(other).weight): weakref.ref(gone)}
    del gone
    gc.collect()
    check_ownership(optimizer, [], set())
    assert _WAITING[optimizer] == {}


@pytest.mark.parametrize("replaced", [False, True])
def test_an_optimizer_whose_parameters_were_replaced_is_named(replaced):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    if replaced:
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
        with pytest.raises(OrderError, match=r"load_state_dict\(assign=True\)"):
            train(model, optimizer, steps=1)
    else:
        train(model, optimizer, steps=1)


def test_a_step_that_fails_is_forgotten():
    class Fails(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("out of order")

    model = network()
    broken = Fails(model.parameters(), lr=RATE)
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match="out of order"):
        broken.step()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    train(model, optimizer, steps=5)
    assert steps_of(unit_of(model)) == 5
    assert broken is not None


@pytest.mark.parametrize("kind", ["no gradient", "no rate", "usual"])
def test_steps_that_leave_a_filter_as_it_is_do_not_count(kind):
    model = network()
    rate = 0.0 if kind == "no rate" else RATE
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        if kind == "no gradient":
            unit_of(model).weight.grad = None
        optimizer.step()
    assert steps_of(unit_of(model)) == (3 if kind == "usual" else 0)


def test_coupled_gradients_that_are_views_of_one_bucket_are_given_back():
    layers = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3), nn.LayerNorm(3)
    model = prifu.wrap(nn.Sequential(*layers), decay="coupled", beta=0.01)
    units = list(prifu.filters(model).values())
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.5)
    bucket = torch.ones(sum(unit.weight.numel() for unit in units))
    for unit, part in zip(units, bucket.split([u.weight.numel() for u in units]), strict=True):
        unit.weight.grad = part
    optimizer.step()
    assert torch.equal(bucket, torch.ones_like(bucket))


@pytest.mark.parametrize("related", [True, False])
def test_an_average_that_was_trained_before_wrap_is_named(related):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2))
    average = AveragedModel(plain if related else copy.deepcopy(plain).apply(_anew))
    optimizer = torch.optim.SGD(plain.parameters(), lr=RATE)
    for step in range(20):
        optimizer.zero_grad()
        loss_of(plain, step).backward()
        optimizer.step()
        if related:
            average.update_parameters(plain)
    if related:
        with pytest.warns(PrifuWarning, match="AveragedModel .* made before wrap"):
            prifu.wrap(plain)
    else:
        prifu.wrap(plain)
    assert average is not None


def _anew(module):
    if isinstance(module, nn.Linear):
        module.reset_parameters()
