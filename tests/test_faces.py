import pytest
import torch

from prifu_plugin.data.faces import ATTRIBUTES, _Canvas, _draw, generate_faces
from prifu_plugin.errors import ConfigError


def test_they_are_what_they_were():
    first, second = generate_faces(20, 48, seed=3), generate_faces(20, 48, seed=3)
    assert torch.equal(first.images, second.images)
    assert all(torch.equal(first.labels[name], second.labels[name]) for name in ATTRIBUTES)
    assert not torch.equal(first.images, generate_faces(20, 48, seed=4).images)
    assert 0 <= first.images.min() <= first.images.max() <= 1
    assert len(first.part(5, 9)) == 4


def test_labels_are_balanced_and_correlate_as_ordered():
    wanted = {("lipstick", "smiling"): 0.8, ("beard", "smiling"): -0.5, ("hat", "glasses"): 1.0}
    labels = generate_faces(3000, 48, correlations=wanted, seed=1).labels
    for name, classes in ATTRIBUTES.items():
        shares = labels[name].bincount(minlength=classes) / 3000
        assert (shares - 1 / classes).abs().max() < 0.05
    for a in ATTRIBUTES:
        for b in ATTRIBUTES:
            if a < b and ATTRIBUTES[a] == ATTRIBUTES[b] == 2:
                found = float(torch.corrcoef(torch.stack([labels[a], labels[b]]).float())[0, 1])
                expected = wanted.get((a, b), wanted.get((b, a), 0.0))
                if {a, b} == {"lipstick", "beard"}:
                    expected = -0.4  # both follow smiling
                assert abs(found - expected) < 0.06, (a, b)


@pytest.mark.parametrize("name", list(ATTRIBUTES))
def test_every_attribute_is_drawn(name):
    """The same faces drawn again with one attribute changed differ, each of them."""
    generator = torch.Generator().manual_seed(0)
    chance = torch.rand(40, 24, generator=generator)
    labels = {a: torch.randint(c, (40,), generator=generator) for a, c in ATTRIBUTES.items()}
    other = {**labels, name: (labels[name] + 1) % ATTRIBUTES[name]}
    first, second = (_draw(_Canvas(chance, 48), each, chance) for each in (labels, other))
    changed = (first - second).abs().amax((1, 2, 3)) > 0.05
    assert changed.double().mean() > 0.9  # a hat may hide wrinkles, long hair the earrings


def test_correlations_in_a_chain():
    wanted = {("glasses", "beard"): 0.9, ("beard", "smiling"): 0.5}
    labels = generate_faces(2000, 48, correlations=wanted).labels
    for (a, b), r in {**wanted, ("glasses", "smiling"): 0.45}.items():
        found = float(torch.corrcoef(torch.stack([labels[a], labels[b]]).float())[0, 1])
        assert abs(found - r) < 0.07


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 32},
        {"count": 0},
        {"correlations": {("skin_tone", "smiling"): 0.95}},
        {"correlations": {("skin_colour", "smiling"): 0.5}},
        {"correlations": {("beard", "smiling"): 1.5}},
        {"correlations": {("beard", "hat"): 0.5, ("hat", "beard"): 0.5}},
        {"correlations": {("beard", "smiling"): 0.5, ("beard", "hat"): 0.1}},
    ],
)
def test_bad_input(settings):
    with pytest.raises(ConfigError):
        generate_faces(**{"count": 2, "size": 48, **settings})
