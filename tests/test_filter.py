import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import prifu_plugin as prifu
from prifu_plugin.errors import ConfigError, FilterError


def filter_with(weights, **settings):
    unit = prifu.PriFU(len(weights), prifu.FilterConfig(preserve=False, **settings))
    unit.weight.data = torch.tensor(weights)
    return unit


@given(
    weights=st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=9),
    alpha=st.floats(0, 0.99),
)
def test_eq_3_and_4_against_plain_python(weights, alpha):
    unit = filter_with(weights, alpha=alpha)
    threshold = float(torch.tensor(alpha * max(weights), dtype=torch.float32))
    expected = [w if w > threshold else 0.0 for w in weights]
    assert unit(torch.ones(1, len(weights)))[0].tolist() == expected
    assert unit.open.tolist() == [w > threshold for w in weights]
    assert unit.closed.tolist() == [not w > threshold for w in weights]


def test_a_tie_is_closed_and_the_sign_counts():
    unit = filter_with([1.0, 0.5, -3.0, 0.51], alpha=0.5)
    assert unit.open.tolist() == [True, False, False, True]


def test_all_negative_weights_close_the_layer():
    assert filter_with([-1.0, -0.1], alpha=0.1).open.tolist() == [False, False]


def test_gradient_reaches_open_channels_only():
    unit = filter_with([1.0, 0.05])
    unit(torch.full((2, 2, 3), 2.0)).sum().backward()
    assert unit.weight.grad.tolist() == [12.0, 0.0]


def test_bias_is_not_filtered():
    unit = filter_with([1.0, 0.0], bias=True)
    unit.bias.data = torch.tensor([0.5, 0.25])
    assert unit(torch.ones(1, 2)).tolist() == [[1.5, 0.25]]


def test_preserve_multiplies_by_one_over_init():
    unit = prifu.PriFU(2, prifu.FilterConfig(init=0.05))
    x = torch.randn(3, 2, 4)
    torch.testing.assert_close(unit(x), x)


@pytest.mark.parametrize("dim", [1, -1, 2])
def test_channel_dimension(dim):
    unit = prifu.PriFU(4, prifu.FilterConfig(preserve=False), dim=dim)
    assert torch.equal(unit(torch.ones(4, 4, 4)), torch.full((4, 4, 4), 0.1))


@pytest.mark.parametrize(
    ("name", "value"),
    [("alpha", 1.0), ("alpha", -0.1), ("alpha", float("nan")), ("beta", -1e-3), ("init", 0.0),
     ("beta", float("inf")), ("noise", -1.0)],
)  # fmt: skip
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(ConfigError, match=name):
        prifu.FilterConfig(**{name: value})


def test_weights_stay_fp32_in_a_half_model():
    unit = prifu.PriFU(3).half()
    assert unit.weight.dtype == torch.float32
    assert unit(torch.ones(1, 3, dtype=torch.float16)).dtype == torch.float16
    assert prifu.PriFU(3).double().weight.dtype == torch.float64


def test_nan_is_visible_and_named():
    unit = filter_with([1.0, float("nan")])
    unit.path = "layer1.bn"
    assert torch.isnan(unit(torch.ones(1, 2))[0, 1])
    with pytest.raises(FilterError, match="layer1.bn.*channel 1"):
        unit.check_finite()


def test_copies_and_pickles():
    unit = filter_with([1.0, 0.0])
    for twin in (copy.deepcopy(unit), pickle.loads(pickle.dumps(unit))):
        assert torch.equal(twin(torch.ones(1, 2)), unit(torch.ones(1, 2)))
    assert "2, 1 open" in repr(unit)


def test_cut_filter_keeps_the_function_without_noise_and_bounds_the_bits():
    cut = prifu.CutFilter(3, prifu.FilterConfig(noise=0.3))
    x = torch.randn(64, 3) * 5 + 2
    for _ in range(200):
        cut(x)
    cut.eval()
    quiet = copy.deepcopy(cut)
    quiet.noise = 0.0
    torch.testing.assert_close(quiet(x), x)
    torch.testing.assert_close(
        cut.bits(), torch.full((3,), 0.5 * torch.log2(torch.tensor(1 + (0.1 / 0.3) ** 2)).item())
    )
    with torch.no_grad():
        draws = torch.stack([cut(x) for _ in range(400)])
    spread = (draws.std(0) / x.std(0, correction=0)).mean()
    assert abs(float(spread) - 3.0) < 0.2  # 0.3 in units of W = 0.1


def test_closed_cut_channels_are_constant_whatever_comes_in():
    cut = prifu.CutFilter(2, prifu.FilterConfig(noise=0.5)).eval()
    cut.prifu.weight.data = torch.tensor([0.1, 0.0])
    out = cut(torch.randn(50, 2))
    assert out[:, 1].unique().numel() == 1
    assert out[:, 0].unique().numel() == 50
    assert cut.bits()[1] == 0


def test_what_gets_memory_after_meta_gets_its_first_values():
    with torch.device("meta"):
        model = prifu.wrap(nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8)), init=0.2, bias=True)
    model.to_empty(device="cpu")
    (unit,) = prifu.filters(model).values()
    assert unit.weight.tolist() == pytest.approx([0.2] * 8)
    assert unit.bias.tolist() == [0.0] * 8
    assert unit.filtered.tolist() == [0] * 8


def test_what_is_filtered_stays_so_in_half_precision():
    unit = prifu.PriFU(3)
    unit.filtered[0] = True
    half = {"weight": unit.weight.detach().bfloat16()}
    y = torch.func.functional_call(unit, half, (torch.ones(1, 3),))
    assert (y != 0).tolist() == [[False, True, True]]
