"""A model at chance is named as such, wherever its accuracy is looked at."""

import warnings

import pytest
import torch

import prifu_plugin as prifu
from prifu_plugin.errors import ConfigError, PrifuWarning

TARGETS = torch.tensor([0, 1, 1, 1]).repeat(100)


def logits(right):
    """Return logits that are right in a share of cases."""
    correct = torch.arange(len(TARGETS)) < right * len(TARGETS)
    return torch.nn.functional.one_hot(torch.where(correct, TARGETS, 1 - TARGETS), 2).float()


def test_a_model_that_learned_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prifu.learned(logits(0.9), TARGETS)


def test_the_most_frequent_answer_is_not_learning():
    always = torch.tensor([[0.0, 1.0]]).repeat(len(TARGETS), 1)
    with pytest.warns(PrifuWarning, match=r"at chance: 75\.0 % right, and 75\.0 %"):
        assert not prifu.learned(always, TARGETS)


def test_luck_is_rarely_taken_for_learning():
    generator = torch.Generator().manual_seed(0)
    lucky = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PrifuWarning)
        for _ in range(400):
            targets = torch.randint(2, (200,), generator=generator)
            lucky += prifu.learned(torch.randn(200, 2, generator=generator), targets)
    assert lucky <= 0.05 * 400


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ConfigError, match=r"outputs \(400, 2\) and targets \(3,\)"):
        prifu.learned(logits(1.0), TARGETS[:3])


def test_no_threshold_is_chosen_at_chance_without_a_word():
    torch.manual_seed(0)
    model = prifu.wrap(torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.BatchNorm1d(2))).eval()
    data = [(torch.randn(50, 4), torch.arange(50) % 2) for _ in range(2)]
    with pytest.warns(PrifuWarning, match="no more than by chance"):
        prifu.fit_alpha(model, data, max_drop=0.5)


@pytest.mark.slow
def test_an_audit_marks_a_model_at_chance():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(600, 4, generator=generator)
    labels = {"task": torch.arange(600) % 2, "private": (x[:, 0] > 0.5).long()}
    data = prifu.AuditData(x, labels)
    parts = data.at(torch.arange(400)), data.at(torch.arange(400, 600))
    cloud = torch.nn.Linear(4, 2).eval()
    settings = {"task": "task", "attributes": ["private"], "suite": "quick", "seeds": 1}
    edge = torch.nn.Identity().eval()
    found = prifu.audit(edge, *parts, cloud=cloud, reconstruct=False, **settings)
    assert "the model is at chance at its own task" in found.attributes[0].marks
    told = prifu.audit(edge, *parts, reconstruct=False, **settings)
    assert not [mark for mark in told.attributes[0].marks if "chance" in mark]


@pytest.mark.parametrize("shape", [(40,), (40, 1)])
def test_one_logit_of_two_classes(shape):
    targets = torch.arange(40) % 2
    assert prifu.learned((targets * 2.0 - 1).reshape(shape), targets)


@pytest.mark.parametrize("shape", [(40,), (40, 1)])
def test_probabilities_of_two_classes_are_refused(shape):
    targets = torch.arange(40) % 2
    with pytest.raises(ConfigError, match=r"from 0\.05 to 0\.95 look like probabilities"):
        prifu.learned((targets * 0.9 + 0.05).reshape(shape), targets)


def test_a_batch_of_few_logits_and_hard_answers_are_none():
    data = [(torch.tensor([[-2.0], [3.0]]), torch.tensor([0, 1]))] * 20
    data.append((torch.tensor([[0.1], [0.9]]), torch.tensor([1, 1])))
    model = prifu.wrap(torch.nn.Sequential(torch.nn.BatchNorm1d(1))).eval()
    assert prifu.sweep(model, data, [0.0])[0].score == 1.0
    flags = torch.arange(40) % 2
    assert prifu.learned(flags.float(), flags)
    assert prifu.learned(flags, flags)


@pytest.mark.parametrize("size", [4, 40])
def test_probabilities_in_batches_are_refused(size):
    x = torch.linspace(-4, 4, 40)[torch.randperm(40), None]
    data = list(zip(x.split(size), (x[:, 0] > 0).long().split(size), strict=True))
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(1), torch.nn.Sigmoid())
    with pytest.raises(ConfigError, match="look like probabilities"):
        prifu.sweep(prifu.wrap(model).eval(), data, [0.0])


def test_logits_that_are_nearly_constant_are_none():
    targets = torch.tensor([0, 1, 1]).repeat(20)
    with pytest.warns(PrifuWarning, match="at chance"):
        assert not prifu.learned(torch.linspace(0.4, 0.7, 60), targets)


def test_classes_that_the_model_has_not_are_refused():
    with pytest.raises(ConfigError, match="reach from 10 to 11"):
        prifu.learned(torch.eye(2).repeat(20, 1), torch.arange(40) % 2 + 10)


def test_flags_are_targets():
    outputs, flags = torch.eye(2).repeat(20, 1), torch.tensor([False, True]).repeat(20)
    assert prifu.learned(outputs, flags)
