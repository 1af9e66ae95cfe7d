"""The decay in the ways people train: each against an ordinary loop, or against Eq. 11."""

import copy
import gc
import warnings

import pytest
import timm
import torch
from torch import nn

import prifu_plugin as prifu

BETA, RATE = 0.05, 0.1


def network(**settings):
    torch.manual_seed(0)
    layers = nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2)
    return prifu.wrap(nn.Sequential(*layers), **{"beta": BETA, **settings})


CLOSING = {"alpha": 0.9, "beta": 1.0}
"""With these, channels close within a few steps."""


def loss_of(model, seed, rows=slice(None)):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 4, generator=generator)
    return nn.functional.cross_entropy(model(x[rows]), (x[:, 0] > 0).long()[rows])


def ordinary(model, steps=20, make=None):
    optimizer = (make or (lambda p: torch.optim.SGD(p, lr=RATE, momentum=0.9)))(model.parameters())
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    return model


def unit_of(model):
    return prifu.filters(model)["1"]


def same_weights(first, second, tolerance=0.0):
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    for (name, a), (other, b) in pairs:
        assert name.removeprefix("_orig_mod.") == other.removeprefix("_orig_mod.")
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_uneven_accumulation():
    model, plain = network(), ordinary(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    for step in range(20):
        optimizer.zero_grad()
        for rows in (slice(0, 7), slice(7, 12)):
            (loss_of(model, step, rows) * (rows.stop - rows.start) / 12).backward()
        optimizer.step()
    same_weights(model, plain, 1e-5)
    assert unit_of(model).dose == pytest.approx(unit_of(plain).dose)


def test_clipping_by_value():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    loss_of(model, 0).backward()
    nn.utils.clip_grad_value_(model.parameters(), 1e-3)
    before, grad = unit_of(model).weight.detach().clone(), unit_of(model).weight.grad.clone()
    optimizer.step()
    expected = (1 - RATE * BETA) * before - RATE * grad
    torch.testing.assert_close(unit_of(model).weight.detach(), expected, rtol=0, atol=1e-7)


def test_gradient_checkpointing():
    def train(checkpointing):
        torch.manual_seed(0)
        model = prifu.wrap(timm.create_model("test_vit", num_classes=2), alpha=0.99, beta=BETA)
        model.set_grad_checkpointing(checkpointing)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for step in range(3):
            x = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        assert any(unit.filtered.any() for unit in prifu.filters(model).values())
        return model

    same_weights(train(True), train(False), 1e-5)


def test_a_rate_for_w_alone_is_another_init():
    """With SGD, k times the rate for W and beta / k for the same dose: what init / sqrt(k) does."""

    def scales(init, share):
        model = network(init=init, beta=0.4 / share, alpha=0.7)
        others = [p for name, p in model.named_parameters() if not name.endswith("prifu.weight")]
        own = {"params": [unit_of(model).weight], "lr": RATE * share}
        optimizer = torch.optim.SGD([{"params": others}, own], lr=RATE)
        for step in range(30):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
        assert unit_of(model).dose == pytest.approx(30 * RATE * 0.4)
        return unit_of(model).scale().detach()

    slow, gentle = scales(0.1, 0.04), scales(0.5, 1.0)
    torch.testing.assert_close(slow, gentle, rtol=1e-3, atol=1e-5)
    assert 0 < (slow == 0).sum() < 8
    assert not torch.allclose(scales(0.1, 1.0), gentle, rtol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model, plain = network(), ordinary(network(), 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    for step in range(10):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
    assert unit_of(model).weight.dtype == torch.float32
    assert unit_of(model).dose == pytest.approx(unit_of(plain).dose)
    torch.testing.assert_close(unit_of(model).weight, unit_of(plain).weight, rtol=0.1, atol=0.02)


def test_layer_decay_gives_each_filter_its_own_dose():
    from timm.optim import create_optimizer_v2

    model = prifu.wrap(timm.create_model("test_vit", num_classes=2), beta=BETA)
    optimizer = create_optimizer_v2(model, "sgd", lr=0.1, layer_decay=0.5)
    model(torch.randn(2, 3, 160, 160)).square().mean().backward()
    for group in optimizer.param_groups:  # what timm's schedulers do with the scale
        group["lr"] = 0.1 * group["lr_scale"]
    optimizer.step()
    doses = {path: unit.dose for path, unit in prifu.filters(model).items()}
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    for path, unit in prifu.filters(model).items():
        assert doses[path] == pytest.approx(0.1 * scales[id(unit.weight)] * BETA)
    assert len(set(doses.values())) > 2


def test_a_schedule_that_warms_up_from_zero():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 4, 1.0))
    for step in range(8):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        schedule.step()
    assert unit_of(model).dose == pytest.approx(BETA * RATE * (0 + 0.25 + 0.5 + 0.75 + 4))


def test_a_frozen_backbone_keeps_its_filters():
    model = network()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("3."))
    before = unit_of(model).weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ordinary(model, 5, lambda p: torch.optim.Adam([q for q in p if q.requires_grad], lr=0.01))
    assert torch.equal(unit_of(model).weight, before)
    assert unit_of(model).dose == 0


def test_alpha_changed_in_mid_run():
    model = ordinary(network(alpha=0.0), 5)
    unit_of(model).weight.data[:2] = 0.01
    unit_of(model).alpha = 0.5
    ordinary(model, 1)
    assert not unit_of(model).weight[:2].any()
    assert prifu.status(model)["open"] <= 6


def test_a_compiled_step():
    model, plain = network(), ordinary(network(), 3, lambda p: torch.optim.SGD(p, lr=RATE))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(compiled, step).backward()
        optimizer.step()
    same_weights(model, plain, 1e-5)


@pytest.mark.parametrize(
    "kind", [torch.optim.SGD, pytest.param(torch.optim.AdamW, marks=pytest.mark.slow)]
)
def test_a_whole_step_compiled(kind):
    gc.collect()  # the compiler counts on filters in memory to stay while it looks at them
    model, plain = network(alpha=0.9), ordinary(network(alpha=0.9), 4, lambda p: kind(p, lr=RATE))
    optimizer = kind(model.parameters(), lr=RATE)

    def step(x):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long()).backward()
        optimizer.step()

    compiled = torch.compile(step, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about what it does not compile
        for seed in range(4):
            compiled(torch.randn(12, 4, generator=torch.Generator().manual_seed(seed)))
    same_weights(model, plain, 1e-5)
    assert unit_of(model).dose == pytest.approx(unit_of(plain).dose)
    assert unit_of(model).closed.any()


def test_checkpoint_and_resume_are_bit_equal():
    whole = network(**CLOSING)
    make = torch.optim.AdamW(whole.parameters(), lr=0.01)
    parts = network(**CLOSING)
    optimizer = torch.optim.AdamW(parts.parameters(), lr=0.01)
    for step in range(10):
        for model, one in ((whole, make), (parts, optimizer)):
            one.zero_grad()
            loss_of(model, step).backward()
            one.step()
        if step == 4:
            state = copy.deepcopy((parts.state_dict(), optimizer.state_dict()))
            assert 0 < unit_of(parts).closed.sum() < 8
            parts = network(**CLOSING)
            optimizer = torch.optim.AdamW(parts.parameters(), lr=0.01)
            parts.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
    same_weights(whole, parts)


def test_a_last_window_of_accumulation_that_is_shorter():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    windows = [(0, 1, 2), (3, 4, 5), (6,)]
    for window in windows:
        optimizer.zero_grad()
        for step in window:
            (loss_of(model, step) / len(window)).backward()
        optimizer.step()
    assert unit_of(model).dose == pytest.approx(len(windows) * RATE * BETA)


def test_a_norm_that_is_called_twice_is_decayed_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.norm(self.norm(x).relu()))

    torch.manual_seed(0)
    model = prifu.wrap(Twice(), beta=BETA)
    unit = prifu.filters(model)["norm"]
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    before = unit.weight.detach().clone()
    loss_of(model, 0).backward()
    optimizer.step()
    expected = before - RATE * unit.weight.grad - RATE * BETA * before
    expected[expected <= unit.alpha * expected.max()] = 0.0
    torch.testing.assert_close(unit.weight.detach(), expected)
    assert unit.dose == pytest.approx(RATE * BETA)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("clipped", [False, True])
def test_fused_under_a_scaler_that_skips(kind, clipped):
    model, plain = network(**CLOSING), network(**CLOSING)
    reference = kind(plain.parameters(), lr=0.01)
    optimizer = kind(model.parameters(), lr=0.01, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(6):
        for one, own in ((plain, reference), (model, optimizer)):
            own.zero_grad()
            loss = loss_of(one, step)
            if one is plain:
                if step == 3:
                    continue  # what the scaler is to skip
                loss.backward()
                if clipped:
                    nn.utils.clip_grad_norm_(one.parameters(), 0.5)
                own.step()
                continue
            scaler.scale(loss * (float("inf") if step == 3 else 1)).backward()
            if clipped:
                scaler.unscale_(own)
                nn.utils.clip_grad_norm_(one.parameters(), 0.5)
            scaler.step(own)
            scaler.update()
    torch.testing.assert_close(unit_of(model).weight, unit_of(plain).weight, rtol=1e-4, atol=1e-6)
    assert unit_of(model).dose == pytest.approx(5 * 0.01)
    assert 0 < unit_of(model).closed.sum() < 8
    assert torch.equal(unit_of(model).filtered, unit_of(plain).filtered)


def test_channels_last_trains_alike():
    def net():
        torch.manual_seed(0)
        return prifu.wrap(
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)), beta=BETA
        )

    models = [net(), net().to(memory_format=torch.channels_last)]
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        for step in range(3):
            x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))
            if model is models[1]:
                x = x.to(memory_format=torch.channels_last)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    same_weights(*models, 1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["batch", "layer", "group", "fused"])
def test_folding_is_a_separate_product_within_fp32_rounding(kind, bias):
    from timm.layers import BatchNormAct2d

    norms = {
        "batch": lambda: nn.BatchNorm2d(8),
        "layer": lambda: nn.LayerNorm(8),
        "group": lambda: nn.GroupNorm(2, 8),
        "fused": lambda: BatchNormAct2d(8, act_layer=nn.SiLU),
    }
    torch.manual_seed(0)
    norm = norms[kind]()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
    shape, dims = ((4, 6, 8), (1, 1, 8)) if kind == "layer" else ((4, 8, 6, 6), (1, 8, 1, 1))
    folded = prifu.wrap(nn.Sequential(norm), bias=bias)
    unit = prifu.filters(folded)["0"]
    unit.weight.data.uniform_(0.05, 0.2)
    unit.weight.data[:3] = 0.001
    x = torch.randn(shape)
    separate = copy.deepcopy(norm)
    if kind == "fused":
        separate.act = nn.Identity()
    scale = unit.weight.detach().clone().requires_grad_()
    shift = torch.zeros(8, requires_grad=True)
    factor = torch.where(unit.closed, 0.0, scale * unit.gain).reshape(dims)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = separate(theirs) * factor + (shift.reshape(dims) if bias else 0)
    expected = nn.functional.silu(expected) if kind == "fused" else expected
    found = folded(ours)
    for result in (expected, found):
        (result * torch.linspace(-1, 1, result.numel()).reshape(shape)).sum().backward()
    pairs = [(found, expected), (ours.grad, theirs.grad), (unit.weight.grad, scale.grad)]
    pairs += [(folded[0].weight.grad, separate.weight.grad)]
    pairs += [(folded[0].bias.grad, separate.bias.grad)]
    pairs += [(unit.bias.grad, shift.grad)] if bias else []
    for one, other in pairs:
        largest = other.abs().max()
        assert (one - other).abs().max() <= 3e-6 * largest
