"""The analysis, on cases with known answers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from prifu_plugin.audit.statistics import (
    bootstrap,
    half_width,
    leak,
    majority_guess,
    mean_interval,
    metrics,
    task_guess,
)


def confident(classes, labels, share_right, seed=0):
    """Scores that name the true class in a known share of cases, with that confidence."""
    generator = torch.Generator().manual_seed(seed)
    right = torch.rand(len(labels), generator=generator) < share_right
    named = torch.where(right, labels, (labels + 1) % classes)
    probabilities = torch.full((len(labels), classes), (1 - share_right) / (classes - 1))
    probabilities.scatter_(1, named[:, None], share_right)
    return probabilities.double().log()


def test_noise_at_a_known_rate():
    labels = torch.arange(20_000) % 2
    found = metrics(confident(2, labels, 0.8), labels)
    assert found.accuracy.value == pytest.approx(0.8, abs=0.01)
    assert found.accuracy.low < 0.8 < found.accuracy.high
    assert found.balanced == pytest.approx(0.8, abs=0.01)
    assert found.auc.value == pytest.approx(0.8, abs=0.01)
    entropy = -(0.8 * math.log2(0.8) + 0.2 * math.log2(0.2))
    assert found.bits == pytest.approx(1 - entropy, abs=0.02)


def test_independent_scores():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (5000,), generator=generator)
    scores = torch.randn(5000, 4, generator=generator).log_softmax(1)
    found = metrics(scores, labels)
    assert abs(found.accuracy.value - 0.25) < 0.03
    assert abs(found.auc.value - 0.5) < 0.03
    assert found.bits < 0.0


@given(seed=st.integers(0, 1000), classes=st.integers(2, 5))
@settings(max_examples=25, deadline=None)
def test_against_scikit_learn(seed, classes):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(120) % classes
    scores = (torch.randn(120, classes, generator=generator) * 2).round().log_softmax(1).double()
    found = metrics(scores, labels)
    expected = balanced_accuracy_score(labels.numpy(), scores.argmax(1).numpy())
    assert found.balanced == pytest.approx(expected)
    each = [roc_auc_score((labels == c).numpy(), scores[:, c].numpy()) for c in range(classes)]
    assert found.auc.value == pytest.approx(sum(each) / classes)


def test_the_interval_covers_the_truth():
    covered = 0
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        right = (torch.rand(200, generator=generator) < 0.3).double()
        found = bootstrap(lambda index, right=right: float(right[index].mean()), 200, seed)
        covered += found.low <= 0.3 <= found.high
    assert covered >= 52
    width = found.high - found.low
    assert width == pytest.approx(2 * half_width(found.value, 200), rel=0.25)


def test_items_of_a_group_count_once():
    one = (torch.rand(100, generator=torch.Generator().manual_seed(0)) < 0.3).double()
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(1))
    ten, groups = one.repeat(10)[order], torch.arange(100).repeat(10)[order] * 7

    def width(right, groups=None):
        found = bootstrap(lambda i: float(right[i].mean()), len(right), groups=groups)
        return found.high - found.low

    assert width(ten, groups) == pytest.approx(width(one), rel=0.15)
    assert width(ten) < 0.45 * width(one)
    alone = torch.arange(100)
    assert width(one, alone) == width(one)
    few = bootstrap(lambda i: 0.5, 1000, groups=torch.arange(1000) % 30)
    assert math.isnan(few.low)


@pytest.mark.parametrize("grouped", [False, True])
def test_means_are_resampled_as_anything_else_is(grouped):
    generator = torch.Generator().manual_seed(5)
    values = torch.rand(600, generator=generator).double()
    groups = torch.randint(80, (600,), generator=generator) * 3 if grouped else None
    slow = bootstrap(lambda i: float(values[i].mean()), 600, 7, groups=groups)
    fast = mean_interval(values, 7, groups=groups)
    for name in ("value", "low", "high"):
        assert getattr(fast, name) == pytest.approx(getattr(slow, name), abs=1e-12)


def test_few_items_give_no_interval():
    found = bootstrap(lambda index: 0.5, 30)
    assert math.isnan(found.low)
    assert math.isnan(mean_interval(torch.full((30,), 0.5)).low)
    assert str(found) == "0.500"


def test_leak_is_measured_from_the_floor_to_the_plain_model():
    generator = torch.Generator().manual_seed(0)

    def right(share):
        return (torch.rand(4000, generator=generator) < share).double()

    floor, plain = right(0.2), right(0.8)
    assert leak(plain, plain, floor).value == 1
    assert leak(floor, plain, floor).value == 0
    half = leak(right(0.5), plain, floor)
    assert half.low < 0.5 < half.high
    assert half.high - half.low < 0.12
    assert leak(floor, floor, floor) is None
    barely = leak(right(0.25), right(0.28), right(0.2))
    assert barely is None or barely.high - barely.low > 0.4


def test_floors():
    train, test = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 0])
    assert majority_guess(train, test).tolist() == [1, 0, 1]
    answers, private = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([3, 3, 4, 4, 5])
    asked = torch.tensor([0, 1, 1, 2]), torch.tensor([3, 4, 5, 3])
    assert task_guess((answers, private), asked).tolist()[:3] == [1, 1, 0]


def test_the_floor_of_a_superset_task():
    # Ten classes, the task is living or not: 0.6 / 6 + 0.4 / 4 of the images.
    digit = torch.arange(1000) % 10
    living = ((digit >= 2) & (digit <= 7)).long()
    floor = task_guess((living, digit), (living, digit)).mean()
    assert floor == pytest.approx(0.2)
