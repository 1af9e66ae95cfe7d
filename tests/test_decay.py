import copy
import warnings

import pytest
import torch
from torch import nn

import prifu_plugin as prifu
from prifu_plugin.errors import ConfigError, FilterError, OrderError

BETA, RATE = 0.05, 0.1


def make(**settings):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    return prifu.wrap(net, beta=BETA, preserve=False, **settings)


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 4, generator=generator), torch.randint(2, (16,), generator=generator)


def loss_of(net, seed=0, scale=1.0):
    x, y = batch(seed)
    return nn.functional.cross_entropy(net(x), y) * scale


def weight(net):
    return prifu.filters(net)["1"].weight


def filtered(w, alpha=0.1):
    return torch.where(w > alpha * w.max(), w, torch.zeros_like(w))


def test_eq_11_with_sgd():
    net = make()
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    for step in range(5):
        optimizer.zero_grad()
        loss_of(net, step).backward()
        before, grad = weight(net).detach().clone(), weight(net).grad.clone()
        optimizer.step()
        expected = filtered((1 - RATE * BETA) * before - RATE * grad)
        torch.testing.assert_close(weight(net).detach(), expected, rtol=0, atol=1e-7)
    assert abs(prifu.filters(net)["1"].dose - 5 * RATE * BETA) < 1e-9


@pytest.mark.parametrize(
    "build",
    [
        lambda p: torch.optim.SGD(p, lr=RATE, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=RATE, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, lr=RATE),
        lambda p: torch.optim.Adam(p, lr=RATE, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=RATE, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=RATE, weight_decay=0.1, foreach=True),
        lambda p: torch.optim.ASGD(p, lr=RATE, lambd=0.2, alpha=0.0),
    ],
)
def test_decay_stands_beside_the_optimizer_and_other_decay_stays_away(build):
    net = make()
    twin = nn.Parameter(weight(net).detach().clone())
    optimizer, plain = build(net.parameters()), build([twin])
    plain.param_groups[0]["weight_decay"] = 0.0
    if "lambd" in plain.param_groups[0]:  # ASGD's, which sets the step size as well
        plain.param_groups[0]["lambd"] = 0.0
    for step in range(6):
        optimizer.zero_grad()
        loss_of(net, step).backward()
        twin.grad = weight(net).grad.clone()
        before = weight(net).detach().clone()
        optimizer.step()
        plain.step()
        with torch.no_grad():
            twin.copy_(filtered(twin - RATE * BETA * before))
            for value in plain.state[twin].values():
                if isinstance(value, torch.Tensor) and value.shape == twin.shape:
                    value[twin == 0] = 0.0
        torch.testing.assert_close(weight(net).detach(), twin.detach())
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_filtered_channel_stays_zero(momentum):
    net = make()
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE, momentum=momentum)
    loss_of(net).backward()
    optimizer.step()
    weight(net).data[3] = 1e-4
    for step in range(20):
        optimizer.zero_grad()
        loss_of(net, step).backward()
        optimizer.step()
        assert weight(net)[3] == 0


def test_adam_state_of_filtered_channels_is_cleared():
    net = make()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    loss_of(net).backward()
    optimizer.step()
    weight(net).data[0] = 0.0
    optimizer.step()
    state = optimizer.state[weight(net)]
    assert state["exp_avg"][0] == 0
    assert state["exp_avg_sq"][0] == 0
    assert state["exp_avg"][1] != 0


def test_accumulation_decays_once():
    one, four = make(), make()
    for net, parts in ((one, 1), (four, 4)):
        optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
        net.eval()
        for _ in range(parts):
            loss_of(net, scale=1 / parts).backward()
        optimizer.step()
    torch.testing.assert_close(weight(one), weight(four))


def test_clipping_does_not_shrink_the_decay():
    net = make()
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    loss_of(net, scale=1e6).backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1e-12)
    before = weight(net).detach().clone()
    optimizer.step()
    torch.testing.assert_close(weight(net).detach(), before * (1 - RATE * BETA))


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_scales_nothing_and_skips(fused):
    reference, scaled = make(), make()
    plain = torch.optim.SGD(reference.parameters(), lr=RATE)
    loss_of(reference).backward()
    plain.step()
    optimizer = torch.optim.SGD(scaled.parameters(), lr=RATE, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss_of(scaled)).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(weight(scaled), weight(reference))
    before = weight(scaled).detach().clone()
    scaler.scale(loss_of(scaled, scale=float("inf"))).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(weight(scaled).detach(), before)


def test_closures_and_frozen_filters():
    net = make()
    weight(net).requires_grad_(False)
    before = weight(net).clone()
    optimizer = torch.optim.LBFGS([p for p in net.parameters() if p.requires_grad], max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(net)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.equal(weight(net), before)
    weight(net).requires_grad_(True)
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    optimizer.step(closure)
    assert not torch.equal(weight(net), before)


@pytest.mark.parametrize("inplace", [True, False])
def test_an_optimizer_built_before_wrap_is_an_error(inplace):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    wrapped = prifu.wrap(net, inplace=inplace)
    loss_of(wrapped).backward()
    with pytest.raises(OrderError, match="before wrap"):
        optimizer.step()


def test_filters_in_an_optimizer_of_their_own_are_fine():
    net = make()
    own = torch.optim.SGD([weight(net)], lr=RATE)
    others = torch.optim.SGD([p for p in net.parameters() if p is not weight(net)], lr=RATE)
    loss_of(net).backward()
    others.step()
    own.step()
    assert prifu.filters(net)["1"].dose > 0


def test_an_attack_on_a_frozen_extractor_is_fine():
    net = make()
    probe = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(probe.parameters(), lr=RATE)
    probe(net(batch()[0])).sum().backward()
    optimizer.step()
    assert all(unit.dose == 0 for unit in prifu.filters(net).values())


def test_lr_times_beta_of_one_is_refused_before_anything_changes():
    net = make()
    optimizer = torch.optim.SGD(net.parameters(), lr=1 / BETA)
    loss_of(net).backward()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ConfigError, match="lr \\* beta"):
        optimizer.step()
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_non_finite_weights_are_an_error():
    net = make()
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    loss_of(net, scale=float("nan")).backward()
    with pytest.raises(FilterError, match="'1'"):
        optimizer.step()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused_at_once(value):
    net = make()
    loss_of(net).backward()
    weight(net).data[3] = value
    with pytest.raises(FilterError, match="channel 3"):
        torch.optim.SGD(net.parameters(), lr=RATE).step()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.LBFGS])
def test_gradients_of_a_closure_that_are_not_finite_ruin_nothing(kind):
    net = make()
    optimizer = kind(net.parameters(), lr=RATE)
    before = copy.deepcopy(list(net.parameters()))

    def closure():
        optimizer.zero_grad()
        loss = loss_of(net, scale=float("nan"))
        loss.backward()
        return loss

    with pytest.raises(FilterError, match="nothing was changed"):
        optimizer.step(closure)
    assert all(map(torch.equal, before, net.parameters()))
    assert len(optimizer.param_groups) == 1
    loss_of(net).backward()
    if kind is torch.optim.SGD:
        optimizer.zero_grad()
        loss_of(net).backward()
        optimizer.step()
        assert prifu.filters(net)["1"].dose == pytest.approx(RATE * BETA)


def test_a_scheduler_sees_the_groups_it_knows():
    net = make()
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            loss_of(net, step).backward()
            optimizer.step()
            scheduler.step()
    saved = optimizer.state_dict()
    assert len(saved["param_groups"]) == 1
    optimizer.load_state_dict(saved)


def test_resume_equals_an_uninterrupted_run():
    def steps(net, optimizer, start, stop):
        for step in range(start, stop):
            optimizer.zero_grad()
            loss_of(net, step).backward()
            optimizer.step()

    whole = make()
    optimizer = torch.optim.SGD(whole.parameters(), lr=RATE, momentum=0.9)
    steps(whole, optimizer, 0, 4)
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    steps(whole, optimizer, 4, 8)
    again = make()
    optimizer = torch.optim.SGD(again.parameters(), lr=RATE, momentum=0.9)
    again.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    steps(again, optimizer, 4, 8)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def test_dose_to_beta_refuses_nonsense():
    with pytest.raises(ConfigError):
        prifu.dose_to_beta(-1, [0.1])
    with pytest.raises(ConfigError):
        prifu.dose_to_beta(1, [])


class Sharp(torch.optim.Optimizer):
    """SAM: climb to where the loss is sharp, take the gradient there, step from where it was."""

    def __init__(self, params, inner):
        super().__init__(params, {"lr": inner.defaults["lr"], "weight_decay": 0.1})
        self.inner = inner

    def step(self, closure):
        parameters = [p for group in self.param_groups for p in group["params"]]
        with torch.enable_grad():
            closure()
        start = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p in parameters:
                p.add_(p.grad, alpha=0.05)
        with torch.enable_grad():
            closure()
        with torch.no_grad():
            for p, value in zip(parameters, start, strict=True):
                p.copy_(value)
        self.inner.step()


def test_a_wrapped_optimizer_decays_once():
    net = make()
    optimizer = Sharp(net.parameters(), torch.optim.SGD(net.parameters(), lr=RATE))
    before = weight(net).detach().clone()

    def closure():
        net.zero_grad()
        loss = loss_of(net)
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = filtered((1 - RATE * BETA) * before - RATE * weight(net).grad)
    torch.testing.assert_close(weight(net).detach(), expected, rtol=0, atol=1e-7)
    assert abs(prifu.filters(net)["1"].dose - RATE * BETA) < 1e-9


@pytest.mark.parametrize("name", ["lookahead_sgd", "lookahead_adamw"])
def test_lookahead_of_timm(name):
    from timm.optim import create_optimizer_v2

    net = make()
    optimizer = create_optimizer_v2(net, name, lr=RATE)
    for _ in range(7):  # the slow weights move in the sixth step
        optimizer.zero_grad()
        loss_of(net).backward()
        optimizer.step()
    assert abs(prifu.filters(net)["1"].dose - 7 * RATE * BETA) < 1e-9


def test_a_step_after_one_that_failed():
    net = make()
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE, weight_decay=0.1)

    def fails():
        raise KeyError("data")

    with pytest.raises(KeyError):
        optimizer.step(fails)
    loss_of(net).backward()
    before = weight(net).detach().clone()
    optimizer.step()
    expected = filtered((1 - RATE * BETA) * before - RATE * weight(net).grad)
    torch.testing.assert_close(weight(net).detach(), expected, rtol=0, atol=1e-7)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("by_name", [False, True])
def test_a_closure_that_raises_leaves_the_optimizer_as_it_was(by_name):
    model = prifu.wrap(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), beta=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    before = copy.deepcopy(optimizer.state_dict())
    weight = prifu.filters(model)["1"].weight.detach().clone()

    def closure():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(**{"closure": closure}) if by_name else optimizer.step(closure)
    assert optimizer.state_dict() == before
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    assert prifu.filters(model)["1"].dose == pytest.approx(0.01)
    assert not torch.equal(prifu.filters(model)["1"].weight, weight)


def test_coupled_decay_is_a_gradient_that_momentum_carries():
    model, twin = make(), make()
    beta, momentum = 0.05, 0.9
    for net in (model, twin):
        for unit in prifu.filters(net).values():
            unit.alpha, unit.beta = 0.0, beta if net is model else 0.0
            unit.decay = "coupled"
    optimizers = [
        torch.optim.SGD(n.parameters(), lr=0.01, momentum=momentum) for n in (model, twin)
    ]
    for _ in range(4):
        for net, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            loss = loss_of(net)
            if net is twin:  # the same as a term of the loss
                loss = loss + sum(
                    beta / 2 * u.weight.square().sum() for u in prifu.filters(net).values()
                )
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(weight(model), weight(twin), rtol=1e-5, atol=1e-7)
    assert prifu.filters(model)["1"].dose == pytest.approx(4 * 0.01 * beta / (1 - momentum))


def test_the_dose_of_coupled_decay_knows_of_dampening():
    model = prifu.wrap(nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4)), decay="coupled", beta=0.1)
    unit = prifu.filters(model)["1"]
    optimizer = torch.optim.SGD([unit.weight], lr=0.01, momentum=0.5, dampening=0.25)
    for _ in range(3):
        unit.weight.grad = torch.zeros_like(unit.weight)
        optimizer.step()
    assert unit.dose == pytest.approx((1 + 2 * 0.75) * 0.01 * 0.1 / 0.5)


def test_coupled_decay_refuses_what_it_cannot_do():
    net = make()
    for unit in prifu.filters(net).values():
        unit.decay = "coupled"
    loss_of(net).backward()
    with pytest.raises(ConfigError, match="decoupled"):
        torch.optim.Adam(net.parameters()).step()
    with pytest.raises(ConfigError, match="decoupled"):
        torch.optim.SGD(net.parameters(), lr=0.1).step(lambda: loss_of(net))
    with pytest.raises(ConfigError, match="decay="):
        prifu.wrap(nn.Sequential(nn.BatchNorm1d(2)), decay="strong")


def test_coupled_decay_is_lent_to_the_gradient_for_the_step_alone():
    net = nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4))
    model = prifu.wrap(net, decay="coupled", beta=0.1, init=1.0)
    unit = prifu.filters(model)["1"]
    optimizer = torch.optim.SGD([unit.weight], lr=0.1)
    unit.weight.grad = torch.full_like(unit.weight, 0.5)
    for _ in range(3):  # nobody sets the gradient to zero
        before = unit.weight.detach().clone()
        optimizer.step()
        torch.testing.assert_close(unit.weight.detach(), before - 0.1 * (0.5 + 0.1 * before))
        assert torch.equal(unit.weight.grad, torch.full_like(unit.weight, 0.5))


def test_a_coupled_step_that_is_refused_changes_no_filter():
    layers = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2), nn.BatchNorm1d(2)
    net = prifu.wrap(nn.Sequential(*layers), decay="coupled")
    first, last = prifu.filters(net).values()
    last.beta = 1.5
    loss_of(net).backward()
    grad = first.weight.grad.clone()
    with pytest.raises(ConfigError, match="beyond 0"):
        torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9).step()
    assert torch.equal(first.weight.grad, grad)
    assert first.dose == 0


def test_what_a_hook_does_to_the_gradient_after_a_coupled_step_stays():
    net = nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4))
    unit = prifu.filters(prifu.wrap(net, decay="coupled", init=1.0))["1"]
    optimizer = torch.optim.SGD([unit.weight], lr=0.1)
    optimizer.register_step_post_hook(lambda opt, *_: opt.zero_grad(set_to_none=False))
    unit.weight.grad = torch.ones_like(unit.weight)
    optimizer.step()
    assert not unit.weight.grad.any()


def test_coupled_decay_with_momentum_never_carries_weights_beyond_zero():
    def run(product, steps=400):
        net = nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4))
        unit = prifu.filters(prifu.wrap(net, decay="coupled", beta=product / 0.1, alpha=0.0))["1"]
        optimizer = torch.optim.SGD([unit.weight], lr=0.1, momentum=0.9)
        for _ in range(steps):
            unit.weight.grad = torch.zeros_like(unit.weight)
            optimizer.step()
        return unit

    bound = (1 - 0.9**0.5) ** 2
    assert (run(0.99 * bound).weight > 0).all()
    with pytest.raises(ConfigError, match="beyond 0"):
        run(1.01 * bound)


def test_a_coupled_gradient_is_itself_again_after_a_step_that_another_hook_refused():
    net = nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4))
    unit = prifu.filters(prifu.wrap(net, decay="coupled", init=1.0, beta=0.5))["1"]
    optimizer = torch.optim.SGD([unit.weight], lr=0.1)

    def refuse(*_):
        raise KeyboardInterrupt

    handle = optimizer.register_step_pre_hook(refuse)
    unit.weight.grad = torch.ones_like(unit.weight)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    handle.remove()
    before = unit.weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(unit.weight.detach(), before - 0.1 * (1 + 0.5 * before))


def test_coupled_decay_takes_gradients_that_can_be_differentiated():
    net = nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4))
    model = prifu.wrap(net, decay="coupled", init=1.0, beta=0.5)
    unit = prifu.filters(model)["1"]
    loss = model(torch.randn(3, 2)).square().sum()
    (unit.weight.grad,) = torch.autograd.grad(loss, [unit.weight], create_graph=True)
    grad = unit.weight.grad.detach().clone()
    torch.optim.SGD([unit.weight], lr=0.1).step()
    torch.testing.assert_close(unit.weight.grad.detach(), grad)


def test_a_group_that_is_added_after_a_step_failed_stays():
    net = nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4))
    model = prifu.wrap(net)
    weight = prifu.filters(model)["1"].weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model(torch.randn(3, 2)).square().sum().backward()

    def fail(*_):
        raise KeyboardInterrupt

    handle = optimizer.register_step_pre_hook(fail)  # behind ours
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    handle.remove()
    head = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [head]})
    head.grad = torch.ones(3)
    optimizer.step()
    assert (head < 1).all()
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    assert groups[-1] == [id(head)]
    assert sum(id(weight) in group for group in groups) == 1


def test_dampening_does_not_reach_the_first_gradient():
    net = nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4))
    unit = prifu.filters(prifu.wrap(net, decay="coupled", beta=9.0))["1"]
    unit.weight.grad = torch.zeros_like(unit.weight)
    with pytest.raises(ConfigError, match="beyond 0"):
        torch.optim.SGD([unit.weight], lr=0.1, momentum=0.3, dampening=0.8).step()
