"""Parts of data that share nothing, and each have what attackers need."""

import warnings

import pytest
import torch

from prifu_plugin.audit.data import AuditData
from prifu_plugin.audit.disjoint import check_disjoint, split_off
from prifu_plugin.errors import ConfigError, PrifuWarning


def numbers(count, seed, values=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, values, generator=generator), torch.arange(count) % 2


def test_copies_of_an_image_stay_on_one_side_of_a_split():
    x, task = numbers(100, 0)
    twice = AuditData(x.repeat(3, 1), {"task": task.repeat(3)})
    with pytest.warns(PrifuWarning, match="200 of 300 images of train are copies"):
        first, second = split_off(twice, 0.25, 0, ["task"])
    assert len(first) + len(second) == 300
    assert 60 < len(second) <= 75
    ours = {tuple(row.tolist()) for row in first.images}
    assert not ours & {tuple(row.tolist()) for row in second.images}


def test_images_of_one_person_stay_on_one_side_of_a_split():
    x, task = numbers(400, 0)
    x[7] = x[123]  # a copy binds two persons
    persons = torch.arange(400) // 5
    data = AuditData(x, {"task": task}, persons)
    with pytest.warns(PrifuWarning, match="1 of 400 images of train are copies"):
        first, second = split_off(data, 0.25, 0, ["task"])
    assert len(first) + len(second) == 400
    assert 90 <= len(second) <= 100
    here, there = (set(part.groups.tolist()) for part in (first, second))
    assert not here & there
    assert ({7 // 5, 123 // 5} <= here) or ({7 // 5, 123 // 5} <= there)


def test_labels_of_few_persons_are_in_both_parts_whatever_the_seed():
    """Moves for one label once undid those for another."""
    persons = torch.arange(300) // 10
    first, second = (persons < 2).long(), ((persons == 1) | (persons == 2)).long()
    data = AuditData(numbers(300, 0)[0], {"A": first, "B": second}, persons)
    for seed in range(100):
        for part in split_off(data, 0.25, seed, ["A", "B"]):
            assert all(label.unique().tolist() == [0, 1] for label in part.labels.values())


def test_the_smallest_group_is_moved():
    """One person has half of the images, and shares a class with one who has ten."""
    others = torch.arange(2, 31).repeat_interleave(10)
    persons = torch.cat([torch.zeros(300), torch.ones(10), others]).long()
    data = AuditData(numbers(600, 0)[0], {"s": (persons < 2).long()}, persons)
    for seed in range(10):
        assert len(split_off(data, 0.25, seed, ["s"])[1]) <= 160


def test_what_cannot_be_split_is_refused():
    persons = torch.arange(100) // 5
    alone = AuditData(numbers(100, 0)[0], {"s": (persons == 3).long()}, persons)
    with pytest.raises(ConfigError, match="class 1 of 's' is in too few of them"):
        split_off(alone, 0.25, 0, ["s"])
    x = numbers(100, 0)[0]
    x[::5] = 0  # a placeholder under every person
    bound = AuditData(x, {"s": torch.arange(100) % 2}, persons)
    with (
        pytest.warns(PrifuWarning, match="copies"),
        pytest.raises(ConfigError, match="by copies and groups into 1 sets"),
    ):
        split_off(bound, 0.25, 0, ["s"])


@pytest.mark.parametrize("order", ["alone", "twice", "interleaved", "augmented", "by turns"])
def test_near_copies_are_found_whatever_the_order_of_train(order):
    def noisy(images, seed):
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
        return (images + noise / 255).clamp(0, 1)

    x = torch.rand(200, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    test, more = noisy(x, 1), noisy(x, 2)
    train = {
        "alone": x,
        "twice": torch.cat([x, x]),
        "interleaved": x.repeat_interleave(2, 0),
        "augmented": torch.cat([x, more]),
        "by turns": torch.stack([x, more], 1).flatten(0, 1),
    }[order]
    with pytest.raises(ConfigError, match="200 of 200 test images are almost the same"):
        check_disjoint(AuditData(train, {}), AuditData(test, {}))
    others = torch.rand(200, 3, 16, 16, generator=torch.Generator().manual_seed(9))
    check_disjoint(AuditData(train, {}), AuditData(others, {}))


def test_images_that_look_all_the_same_are_said_to_be():
    signs = torch.tensor([1.0, -1.0]).repeat(8)
    x = 0.5 + torch.rand(60, 1, 1, 1) * 0.4 * signs.view(1, 1, 1, 16) * signs.view(1, 1, 16, 1)
    with pytest.warns(PrifuWarning, match="look the same in 8 x 8 means"):
        check_disjoint(AuditData(x[:40], {}), AuditData(x[40:], {}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clear = torch.rand(60, 1, 16, 16, generator=torch.Generator().manual_seed(0))
        check_disjoint(AuditData(clear[:40], {}), AuditData(clear[40:], {}))
