"""The norms' scale moves into W: the same function, the same checkpoint keys, and back again."""

import copy

import pytest
import timm
import torch
from torch import nn

import prifu_plugin as prifu
from prifu_plugin.errors import ConfigError, NoSiteError, OrderError
from prifu_plugin.graph.state import complete_checkpoint


def pretrained(name="test_resnet"):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.double().eval()


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_the_function_stays(name):
    plain = pretrained(name)
    size = plain.pretrained_cfg["input_size"]
    x = torch.randn(2, *size).double()
    wrapped = prifu.wrap(plain, bias=True, alpha=0.0).double()
    before = wrapped(x)
    assert prifu.absorb(wrapped) == {}
    torch.testing.assert_close(wrapped(x), before, rtol=0, atol=1e-11)
    assert set(plain.state_dict()) <= set(wrapped.state_dict())
    back = prifu.unwrap(wrapped)
    torch.testing.assert_close(back(x), before, rtol=0, atol=1e-11)
    assert all(p.requires_grad for p in back.parameters())


def test_weak_channels_close_and_are_counted():
    model = prifu.wrap(nn.Sequential(nn.BatchNorm1d(4)), bias=True)
    model[0].weight.data = torch.tensor([1.0, -0.5, 0.05, 0.0])
    assert prifu.absorb(model) == {"0": 2}
    assert prifu.filters(model)["0"].open.tolist() == [True, True, False, False]


def test_only_the_filter_trains_the_scale_and_pruning_stays_exact():
    model = prifu.wrap(pretrained(), bias=True, beta=0.5).double()
    prifu.absorb(model)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [norm.weight.clone() for norm in norms]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.train()
    for _ in range(20):
        x = torch.randn(8, 3, 64, 64).double()
        loss = nn.functional.cross_entropy(model(x), torch.arange(8) % 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(torch.equal(norm.weight, old) for norm, old in zip(norms, before, strict=True))
    assert prifu.status(model)["open share"] < 1
    model.eval()
    x = torch.randn(2, 3, 64, 64).double()
    pruned = prifu.prune(model, x)
    torch.testing.assert_close(pruned(x), model(x), rtol=0, atol=1e-11)
    again = prifu.rebuild(pretrained(), prifu.plan(pruned), pruned.state_dict())
    assert torch.equal(again(x), pruned(x))


def test_bad_order_is_named():
    with pytest.raises(OrderError, match="not wrapped"):
        prifu.absorb(pretrained())
    with pytest.raises(ConfigError, match="wrap with bias=True"):
        prifu.absorb(prifu.wrap(pretrained()))
    bare = nn.Sequential(nn.BatchNorm1d(3, affine=False))
    with pytest.raises(NoSiteError, match="has a scale"):
        prifu.absorb(prifu.wrap(bare, bias=True))
    model = prifu.wrap(pretrained(), bias=True, alpha=0.0)
    prifu.absorb(model)
    with pytest.raises(OrderError, match="call absorb once"):
        prifu.absorb(model)


@pytest.mark.parametrize("frozen", [False, True])
def test_who_holds_the_scale_is_in_a_checkpoint(frozen):
    def make():
        model = prifu.wrap(pretrained(), bias=True)
        for norm in norms(model):
            norm.weight.requires_grad_(not frozen)
        return model

    def norms(model):
        return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]

    model, fresh = make(), make()
    prifu.absorb(model)
    fresh.load_state_dict(model.state_dict())
    assert not any(norm.weight.requires_grad for norm in norms(fresh))
    with pytest.raises(OrderError, match="absorbed"):
        prifu.absorb(fresh)
    plain, expected = prifu.unwrap(fresh), prifu.unwrap(model)
    x = torch.randn(2, 3, 64, 64).double()
    assert torch.equal(plain.eval()(x), expected.eval()(x))
    assert all(norm.weight.requires_grad == (not frozen) for norm in norms(plain))
    assert not plain._load_state_dict_post_hooks


def test_a_checkpoint_that_absorbed_nothing_frees_the_scales():
    plain, absorbed = (prifu.wrap(pretrained(), bias=True) for _ in range(2))
    prifu.absorb(absorbed)
    absorbed.load_state_dict(plain.state_dict())
    norms = [m for m in absorbed.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.weight.requires_grad and norm.bias.requires_grad for norm in norms)


def test_a_checkpoint_without_filters_would_count_absorbed_scales_twice():
    checkpoint = pretrained().state_dict()
    absorbed = prifu.wrap(pretrained(), bias=True)
    prifu.absorb(absorbed)
    before = {name: value.clone() for name, value in absorbed.state_dict().items()}
    with pytest.raises(OrderError, match="Load it before absorb"):
        absorbed.load_state_dict(checkpoint)
    assert all(torch.equal(before[name], value) for name, value in absorbed.state_dict().items())
    head = {name: value for name, value in checkpoint.items() if name.startswith("fc.")}
    absorbed.load_state_dict(head, strict=False)


def test_momentum_does_not_move_scales_that_a_checkpoint_fixed():
    model, other = (prifu.wrap(pretrained(), bias=True) for _ in range(2))
    prifu.absorb(other)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(2, 3, 64, 64).double()
    model(x).sum().backward()
    optimizer.step()
    model.load_state_dict(other.state_dict())
    optimizer.step()
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert torch.equal(norm.weight.detach().abs(), torch.ones_like(norm.weight))


def test_a_norm_that_is_the_model_is_known_too():
    plain = nn.BatchNorm1d(3)
    nn.init.normal_(plain.weight)
    model = prifu.wrap(nn.Sequential(copy.deepcopy(plain)), bias=True)[0]
    model.prifu.holds_scale = True
    with pytest.raises(OrderError, match="count twice"):
        complete_checkpoint(model, plain.state_dict(), "")
