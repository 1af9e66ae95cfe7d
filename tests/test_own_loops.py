"""Optimizers and loops of one's own: they train the filters, or say that they do not."""

import copy
import warnings

import pytest
import timm
import torch
from timm.models.resnet import BasicBlock
from timm.optim import Adafactor, Adopt, Lamb, Lookahead
from timm.utils import freeze
from timm.utils.model import reparameterize_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)

import prifu_plugin as prifu
from prifu_plugin.errors import ConfigError, FilterError, OrderError, PrifuWarning
from prifu_plugin.graph import watch


def network():
    torch.manual_seed(0)
    layers = nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2)
    return prifu.wrap(nn.Sequential(*layers), beta=0.2)


def unit_of(model):
    return prifu.filters(model)["1"]


class ByPosition(torch.optim.Optimizer):
    """Pairs its groups with rates by position, and so leaves out one that is added."""

    def __init__(self, params, lr, weight_decay):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.rates = [group["lr"] for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure=None):
        for group, rate in zip(self.param_groups, self.rates, strict=False):
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - rate * group["weight_decay"]).sub_(p.grad, alpha=rate)


class Frees(torch.optim.Optimizer):
    """Drops gradients in its step, to save memory."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"])
                    p.grad = None


def steps_of_training(model, optimizer, count=3):
    for _ in range(count):
        optimizer.zero_grad()
        (model(torch.randn(16, 4)) - 1).square().mean().backward()
        optimizer.step()


def test_an_optimizer_that_knows_its_groups_by_position_is_refused_with_the_cure():
    model = network()
    with pytest.raises(OrderError, match="leaves out the group.*weight_decay': 0.0"):
        steps_of_training(model, ByPosition(model.parameters(), 0.05, 0.01))
    weights = [unit.weight for unit in prifu.filters(model).values()]
    rest = [p for p in model.parameters() if not any(p is w for w in weights)]
    groups = [{"params": rest}, {"params": weights, "weight_decay": 0.0}]
    before = weights[0].detach().clone()
    steps_of_training(model, ByPosition(groups, 0.05, 0.01))
    assert not torch.equal(before, weights[0])


def test_steps_that_free_gradients_decay_too():
    model = network()
    steps_of_training(model, Frees(model.parameters(), {"lr": 0.05}))
    assert prifu.status(model)["dose"] > 0


def test_counters_in_groups_count_once():
    model = network()
    optimizer = Lamb(model.parameters(), lr=1e-2, weight_decay=0.05)
    steps_of_training(model, optimizer, 5)
    assert float(optimizer.param_groups[0]["step"]) == 5


def test_a_first_step_may_leave_all_weights_where_they_are():
    model = network()
    weight = next(iter(prifu.filters(model).values())).weight
    before = weight.detach().clone()
    steps_of_training(model, Adopt(model.parameters(), lr=1e-2, weight_decay=0.3), 3)
    assert not torch.equal(before, weight)
    assert prifu.status(model)["dose"] > 0


def test_lookahead_with_weight_decay():
    model = network()
    optimizer = Lookahead(torch.optim.AdamW(model.parameters(), lr=1e-3))
    steps_of_training(model, optimizer)
    assert prifu.status(model)["dose"] > 0


def test_an_optimizer_without_a_learning_rate_is_refused():
    model = network()
    with pytest.raises(ConfigError, match="Adafactor has no learning rate"):
        steps_of_training(model, Adafactor(model.parameters()))


@pytest.mark.parametrize("cast", ["data", "assign"])
def test_a_w_below_fp32_is_compared_with_alpha_too(cast):
    model = network()
    unit = unit_of(model)
    unit.alpha = 0.5
    if cast == "data":
        for parameter in model.parameters():
            parameter.data = parameter.data.half()
    else:
        floats = {k: v.half() if v.dtype == torch.float32 else v
                  for k, v in model.state_dict().items()}  # fmt: skip
        model.load_state_dict(floats, assign=True)
    unit.alpha = 0.5
    with torch.no_grad():
        unit.weight[:4] = 0.01
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model(torch.randn(16, 4).half()).float().square().mean().backward()
    optimizer.step()
    assert unit.closed[:4].all()


@pytest.mark.parametrize("by", ["hand", "nobody", "torch"])
def test_training_for_long_without_stepping_the_filters_is_said(by, monkeypatch):
    monkeypatch.setattr(watch, "PASSES", 5)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def train():
        for _ in range(12):
            model.zero_grad()
            model(torch.randn(16, 4)).square().mean().backward()
            if by == "hand":
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter -= 0.01 * parameter.grad
            if by == "torch":
                optimizer.step()

    if by == "torch":
        train()
        return
    with pytest.warns(PrifuWarning, match="5 training passes of Sequential, and no optimizer"):
        train()
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train()


def test_a_weight_that_is_not_finite_while_a_scaler_skips_all_steps_is_said(monkeypatch):
    monkeypatch.setattr(watch, "PASSES", 5)
    model = network()
    next(iter(prifu.filters(model).values())).weight.data[0] = float("nan")
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.01), torch.amp.GradScaler("cpu")

    def train():
        for _ in range(6):
            optimizer.zero_grad()
            scaler.scale(model(torch.randn(16, 4)).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()

    with pytest.raises(FilterError, match="not finite at channel 0"):
        train()


@pytest.mark.parametrize("later", [False, True])
def test_filters_that_were_all_frozen_before_they_did_anything_are_named(later, monkeypatch):
    monkeypatch.setattr(watch, "PASSES", 5)
    model = network()

    def train(steps):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(16, 4)).square().mean().backward()
            optimizer.step()

    if later:
        train(4)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("bias" in name)
    if later:
        train(12)
        return
    with pytest.warns(PrifuWarning, match="all of its filters are frozen"):
        train(12)


@pytest.mark.parametrize("how", ["freeze", "reparameterize"])
def test_filters_that_are_replaced_are_missed(how):
    name = "test_resnet" if how == "freeze" else "repvgg_a0"
    model = prifu.wrap(timm.create_model(name, num_classes=2)).eval()
    x = torch.randn(1, 3, 64, 64)
    model(x)
    if how == "freeze":
        freeze(model)
    else:
        model = reparameterize_model(model)
    with pytest.raises(OrderError, match="is gone.*before wrap"):
        model(x)


@torch.no_grad()
@pytest.mark.parametrize("how", ["checkpoints", "compiled"])
def test_parts_in_wrappers_keep_their_filters(how):
    model = prifu.wrap(timm.create_model("test_resnet", num_classes=2)).eval()
    x = torch.randn(1, 3, 64, 64)
    before = model(x)
    if how == "checkpoints":
        apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, BasicBlock))
    else:
        model.layer1 = torch.compile(model.layer1, backend="eager")
    torch.testing.assert_close(model(x), before)
    torch.testing.assert_close(model(x), before)
    freeze(model, "layer2")
    with pytest.raises(OrderError, match="is gone"):
        model(x)


def test_a_plain_checkpoint_through_distributed_checkpoint():
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    plain = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
    model = prifu.wrap(copy.deepcopy(plain))
    nn.init.ones_(plain[0].weight)
    set_model_state_dict(model, plain.state_dict(), options=StateDictOptions(full_state_dict=True))
    assert torch.equal(model[0].weight, plain[0].weight)
    assert prifu.status(model)["open"] == 8


def test_the_form_and_the_noise_of_a_cut_are_in_its_checkpoint():
    x = torch.randn(8, 3, 8, 8)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
    nets = [nn.Sequential(*copy.deepcopy(layers)) for _ in range(2)]
    bare = prifu.wrap(nets[0], cut="2", preserve=False, noise=0.3, example_inputs=x)
    bare.train()(x)
    kept = prifu.wrap(nets[1], cut="2", example_inputs=x)
    kept.load_state_dict(bare.state_dict())
    cuts = [model.eval().get_submodule("2.prifu") for model in (bare, kept)]
    assert [(cut.restores, cut.noise) for cut in cuts] == [(False, 0.3)] * 2
    for cut in cuts:
        cut.noise = 0.0
    assert torch.equal(bare(x), kept(x))
    old = {k: v for k, v in bare.state_dict().items() if k != "2.prifu._extra_state"}
    kept.load_state_dict(old)  # of before it was kept
