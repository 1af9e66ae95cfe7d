"""The folded parameters of inference: what they follow from is compared, and not computed again."""

import copy
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import prifu_plugin as prifu
from prifu_plugin.filter import PriFU
from prifu_plugin.graph import folding


def net(bias=True, **options):
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1)
    layers = first, nn.BatchNorm2d(6), nn.ReLU(), second, nn.GroupNorm(2, 4)
    for norm in layers[1], layers[4]:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    return prifu.wrap(nn.Sequential(*layers), bias=bias, **options).eval()


def separately(model, x):
    """What a copy that has remembered nothing gives."""
    return copy.deepcopy(model)(x).detach()


def write_in_place(unit, norm):
    unit.weight.mul_(1.5)


def write_data(unit, norm):
    unit.weight.data[0] = 0.0


def write_other_data(unit, norm):
    unit.weight.data = unit.weight.data * 3


def write_alpha(unit, norm):
    unit.weight[1] *= 2
    unit.alpha = 0.9


def write_gain(unit, norm):
    unit.gain = 3.0


def write_filtered(unit, norm):
    unit.filtered[2] = 1


def write_own_bias(unit, norm):
    unit.bias.data.add_(1.0)


def write_norm_scale(unit, norm):
    norm.weight.data.mul_(2.0)


def write_norm_shift(unit, norm):
    norm.bias.data.add_(0.5)


def drop_norm_scale(unit, norm):
    norm.weight = None


WRITES = [write_in_place, write_data, write_other_data, write_alpha, write_gain, write_filtered,
          write_own_bias, write_norm_scale, write_norm_shift, drop_norm_scale]  # fmt: skip


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_every_write_is_seen(write, mode):
    model, x = net(), torch.randn(2, 3, 8, 8)
    with mode():
        before = model(x)
        model(x)
    with torch.no_grad():
        for path in ("1", "4"):
            write(prifu.filters(model)[path], model.get_submodule(path))
    expected = separately(model, x)
    with mode():
        found = model(x)
    assert not torch.equal(before, expected)
    assert torch.equal(found, expected)


def test_a_layer_that_changes_its_type_is_computed_anew():
    model, x = net(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        model(x)
        model.double()
        assert torch.equal(model(x.double()), separately(model, x.double()))


def test_a_checkpoint_and_a_training_step_are_seen():
    model, x = net(), torch.randn(2, 3, 8, 8)
    state = {k: v + 0.25 if v.dtype == torch.float32 else v for k, v in model.state_dict().items()}
    with torch.no_grad():
        model(x)
    model.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(model(x), separately(model, x))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        assert torch.equal(model(x), separately(model, x))


def test_what_has_not_changed_is_not_computed_again():
    model, x = net(), torch.randn(2, 3, 8, 8)
    with mock.patch.object(PriFU, "scale", autospec=True, side_effect=PriFU.scale) as scale:
        with torch.no_grad():
            first, second = model(x), model(x)
            assert scale.call_count == 2  # one a filter
        model(x)
        assert scale.call_count == 4  # gradients want the operations themselves
    assert torch.equal(first, second)


def test_nothing_remembered_is_handed_to_gradients():
    model, x = net(), torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        model(x)
    model(x).sum().backward()
    assert all(unit.weight.grad is not None for unit in prifu.filters(model).values())


def test_a_nan_stays_visible():
    model, x = net(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        prifu.filters(model)["1"].weight.data[0] = float("nan")
        assert all(model(x).isnan().any() for _ in range(2))


def test_copies_and_freed_models_leave_nothing_behind():
    model, x = net(), torch.randn(2, 3, 8, 8)
    known = len(folding._KNOWN)
    with torch.no_grad():
        model(x)
    assert len(folding._KNOWN) == known + 2
    assert model.state_dict().keys() == copy.deepcopy(model).state_dict().keys()
    del model
    assert len(folding._KNOWN) == known


def test_ensembles_under_vmap():
    models = [net(bias=False) for _ in range(3)]
    for at, model in enumerate(models):
        for unit in prifu.filters(model).values():
            unit.weight.data[at] = 0.0
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = torch.stack([model(x) for model in models])
        params, buffers = torch.func.stack_module_state(models)
        run = torch.func.vmap(lambda p, b: torch.func.functional_call(models[0], (p, b), (x,)))
        assert torch.allclose(run(params, buffers), expected, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
def test_tangents_go_on_without_gradients():
    model, x = net(), torch.randn(2, 3, 8, 8)
    weight = prifu.filters(model)["1"].weight
    with torch.no_grad():
        model(x)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(weight.detach().clone(), torch.ones_like(weight))
            out = torch.func.functional_call(model, {"1.prifu.weight": dual}, (x,))
            assert forward_ad.unpack_dual(out).tangent.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:.torch.jit.trace", "ignore:Converting a tensor")
def test_what_follows_a_forward_sees_every_operation():
    model, x = net(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        model(x)
        traced = torch.jit.trace(model, x)
        graph = make_fx(model)(x)
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert model(torch.empty(2, 3, 8, 8)).shape == (2, 4, 6, 6)
        for unit in prifu.filters(model).values():
            unit.weight.data[0] = 0.0
        assert torch.equal(traced(x), model(x))
        assert torch.equal(graph(x), model(x))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (lambda: nn.BatchNorm2d(8), (3, 8, 4, 4)),
        (lambda: nn.LayerNorm(8), (3, 4, 8)),
        (lambda: nn.GroupNorm(2, 8), (3, 8, 4, 4)),
        (lambda: nn.InstanceNorm2d(8, affine=True), (3, 8, 4, 4)),
    ],
)
def test_closed_channels_let_no_sign_through(norm, shape, bias):
    """0 times a negative number is -0: a bit of what is filtered, where an upload has its bytes."""
    model = prifu.wrap(nn.Sequential(norm()), bias=bias).eval()
    nn.init.uniform_(model[0].bias, -1, 1)
    unit = prifu.filters(model)["0"]
    unit.weight.data.zero_()
    x = torch.randn(shape)
    for y in (model(x).detach(), unit(x).detach()):
        assert not y.any()
        assert not torch.signbit(y).any()
