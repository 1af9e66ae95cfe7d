import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import prifu_plugin as prifu
from prifu_plugin import pictures
from prifu_plugin.errors import ConfigError, OrderError
from prifu_plugin.ranks import spearman


class Plain(nn.Module):
    """The filtered network written out, so that autograd gives dl/dX of each sample."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def losses(self, x, y):
        conv, norm, unit = self.model[0], self.model[1], self.model[1].prifu
        normalized = F.batch_norm(
            conv(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
        )
        normalized.retain_grad()
        scale = torch.where(unit.weight > unit.alpha * unit.weight.max(), unit.weight, 0.0)
        filtered = normalized * (unit.gain * scale)[:, None, None]
        return normalized, F.cross_entropy(self.model[4](filtered.relu().mean((2, 3))), y)


def network(bias=False):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), Pool(), nn.Linear(6, 4)
    model = prifu.wrap(nn.Sequential(*layers), bias=bias)
    unit = prifu.filters(model)["1"]
    unit.weight.data = torch.tensor([0.1, 0.0, 0.05, 0.2, 0.02, 0.3])
    return model


class Pool(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


def data(count=12, batch=5):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, 8, 8, generator=generator)
    y = torch.randint(4, (count,), generator=generator)
    return [(x[i : i + batch], y[i : i + batch]) for i in range(0, count, batch)]


def test_eq_8_and_single_samples():
    model = network().eval()
    found = prifu.relevance(model, data())
    grads, input_grads = [], []
    for x, y in data():
        for i in range(len(x)):
            one = x[i : i + 1].clone().requires_grad_()
            normalized, loss = Plain(model).losses(one, y[i : i + 1])
            loss.backward()
            grads.append(normalized.grad.abs().mean((0, 2, 3)))
            input_grads.append(one.grad.abs().mean((0, 2, 3)))
    expected = torch.stack(grads).double().mean(0)
    layer = found.layers["1"]
    torch.testing.assert_close(layer.avgri, expected, rtol=1e-5, atol=1e-12)
    identity = (prifu.filters(model)["1"].scale().abs() * layer.after).detach()
    torch.testing.assert_close(layer.avgri, identity.double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.inputs, torch.stack(input_grads).double().mean(0))
    assert found.samples == 12
    assert layer.avgri[1] == 0


def test_it_disturbs_nothing():
    model = network().train()
    model[0].weight.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    prifu.relevance(model, data())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training
    assert model[1].training
    assert [p.requires_grad for p in model[0].parameters()] == [False, True]
    assert all(p.grad is None for p in model.parameters())
    assert not model[1]._forward_hooks


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("test_resnet", "layer2"),
        ("test_efficientnet", "blocks.1"),
        ("test_vit", "blocks.2"),
        ("test_convnext", "stages.1"),
    ],
)
def test_every_filter_is_measured(name, cut):
    torch.manual_seed(0)
    size = 160 if name == "test_vit" else 64
    x = torch.randn(4, 3, size, size)
    model = timm.create_model(name, num_classes=3)
    model = prifu.wrap(model, cut=cut, bias=True, example_inputs=x)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # the last of a block starts at 0 and lets nothing back
    found = prifu.relevance(model, [(x, torch.tensor([0, 1, 2, 0]))])
    assert set(found.layers) == set(prifu.filters(model))
    for path, layer in found.layers.items():
        assert layer.after.max() > 0, path


def test_a_fused_activation_is_behind_the_filter():
    from timm.layers import BatchNormAct2d

    torch.manual_seed(0)
    model = prifu.wrap(nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4), Pool()))
    model[1].bias.data.fill_(-100.0)  # the activation lets nothing through
    found = prifu.relevance(model, [(torch.randn(4, 3, 4, 4), torch.zeros(4).long())])
    assert found.layers["1"].after.max() == 0


def test_influence_is_the_absolute_gradient():
    model = network().eval()
    x, y = data()[0]
    probe = x.clone().requires_grad_()
    F.cross_entropy(model(probe), y, reduction="sum").backward()
    torch.testing.assert_close(prifu.influence(model, x, y), probe.grad.abs())


def test_spearman():
    x = torch.tensor([1.0, 2.0, 2.0, 5.0])
    assert spearman(x, -x) == -1.0
    assert abs(spearman(x, torch.tensor([1.0, 3.0, 2.0, 4.0])) - 0.9486832980505138) < 1e-9
    assert spearman(x, torch.ones(4)) != spearman(x, torch.ones(4))


def test_pictures():
    model = network()
    found = prifu.relevance(model, data())
    figure, axes = pictures.plot_ranks(found.layers["1"])
    assert axes.get_title().startswith("1: rank correlation")
    _, axes = pictures.plot_inputs(found, ["R", "G", "B"])
    assert len(axes.patches) == 3
    x, y = data()[0]
    _, grid = pictures.plot_influence(x, prifu.influence(model, x, y))
    assert grid.shape == (2, 5)
    assert found.to_dict()["samples"] == 12


def test_bad_input():
    with pytest.raises(OrderError, match="not wrapped"):
        prifu.relevance(nn.Linear(2, 2), data())
    with pytest.raises(ConfigError, match="empty"):
        prifu.relevance(network(), [])
    with pytest.raises(ConfigError, match="one loss a sample"):
        prifu.relevance(network(), data(), F.cross_entropy)


def test_an_activation_without_a_module_is_behind_the_filter():
    from timm.layers.filter_response_norm import FilterResponseNormTlu2d, inv_instance_rms

    torch.manual_seed(0)
    norm = FilterResponseNormTlu2d(4)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), norm, Pool(), nn.Linear(4, 2))
    x, target = torch.randn(8, 3, 5, 5), torch.randint(0, 2, (8,))
    with torch.no_grad():
        h = net[0](x)
        scale, shift, tau = (p.view(1, -1, 1, 1) for p in (norm.weight, norm.bias, norm.tau))
        y = h * inv_instance_rms(h, norm.eps) * scale + shift
    y.requires_grad_(True)
    output = net[3](net[2](torch.maximum(y, tau)))
    nn.functional.cross_entropy(output, target, reduction="sum").backward()
    found = prifu.relevance(prifu.wrap(net), [(x, target)]).layers["1"]
    torch.testing.assert_close(found.after.float(), y.grad.abs().mean((0, 2, 3)))
