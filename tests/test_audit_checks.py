"""What an audit is given: references, groups, clouds, dtypes and modes that do not fit, or do."""

import pytest
import torch
from torch import nn

import prifu_plugin as prifu
from prifu_plugin import AuditData
from prifu_plugin.audit.attackers import Sample, boosting
from prifu_plugin.audit.controls import controls
from prifu_plugin.audit.inference import infer, prepare
from prifu_plugin.channel import Channel, Projection
from prifu_plugin.errors import ConfigError

EDGE = nn.Flatten().eval()
SETTINGS = {"task": "task", "attributes": ["s"], "seeds": 1, "reconstruct": False}


def part(count, seed, first=None, holders=None):
    """Six numbers, the first of which tells s; ten images a person where `first` is given."""
    z = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    person = torch.arange(count) // 10
    s = torch.arange(count) // 2 % 2 if holders is None else (person < holders).long()
    z[:, 0] += 4 * s
    labels = {"task": torch.arange(count) % 2, "s": s, "u": (z[:, 1] > 0).long()}
    return AuditData(z, labels, None if first is None else first + person)


def look(train, test, **settings):
    return prifu.audit(EDGE, train, test, **{**SETTINGS, "suite": "quick", **settings})


TRAIN, TEST = part(300, 0), part(150, 1)


@pytest.fixture(scope="module")
def report():
    return look(TRAIN, TEST)


def test_a_report_of_another_suite_is_refused(report):
    with pytest.raises(ConfigError, match="of the quick suite, and this audit asks for the stand"):
        look(TRAIN, TEST, suite="standard", references={"plain": report})


def test_images_are_attacked_for_attributes_that_no_report_knows(report):
    both = look(TRAIN, TEST, attributes=["s", "u"], references={"input": report})
    assert all("input" in row.ceilings for row in both.attributes)


def test_a_reference_that_is_no_dictionary_is_refused():
    with pytest.raises(ConfigError, match="references is a Flatten: pass a dictionary"):
        look(TRAIN, TEST, references=EDGE)


def test_images_of_one_dimension_are_refused():
    flat = [AuditData(data.images[:, 0], data.labels) for data in (TRAIN, TEST)]
    with pytest.raises(ConfigError, match=r"shape \(300,\): pass \(N, ...\)"):
        look(*flat)


@pytest.mark.parametrize("holders", [1, 3])
def test_a_class_of_few_persons_is_refused(holders):
    train, test = part(400, 0, 0, holders), part(400, 1, 1000, holders)
    with pytest.raises(ConfigError, match="Class 1 of 's' has fewer than 4 groups in train"):
        look(train, test)


def test_a_class_that_half_of_the_training_data_lacks():
    """Persons come one after the other; trees are the attacker."""
    train, choosing, test = (part(200, seed, 0, holders=4) for seed in range(3))
    assert not train.labels["s"][100:].any()
    backwards = train.images.flip(0), train.labels["s"].flip(0)
    uploads = prepare(backwards[0], choosing.images, test.images, "standard")
    labels = (backwards[1], choosing.labels["s"], test.labels["s"])
    half, permuted = controls(uploads, labels, 2, 0, "standardized boosting")
    assert half > 0.9 > permuted


def test_trees_of_one_class_name_it():
    x, y = torch.randn(40, 3), torch.ones(40, dtype=torch.long)
    found = boosting(Sample(x, y, x, y, 3), 0).classify(x)
    assert (found.argmax(1) == 1).all()


def test_perfect_order_does_not_end_the_search_for_a_rare_attribute():
    """Least squares orders the images perfectly, and says of few that they have the attribute."""

    def heavy(count, seed):
        s = (torch.arange(count) % 10 == 0).long()
        u = torch.rand(count, generator=torch.Generator().manual_seed(seed))
        return torch.where(s == 1, 3 + (5 * u).exp(), 2.9 * u)[:, None], s

    (train, s), (choosing, chosen), (test, truth) = heavy(400, 0), heavy(200, 1), heavy(300, 2)
    found = infer(prepare(train, choosing, test, "standard"), (s, chosen, truth), 2)
    assert found.validation["raw ridge"] == 1.0
    assert float((found.scores.argmax(1) == truth).double().mean()) > 0.98


def test_clouds_and_channels_that_do_not_fit_are_said():
    head = nn.Linear(6, 2).eval()
    with pytest.raises(ConfigError, match="The cloud refuses uploads .*its server()"):
        look(TRAIN, TEST, cloud=head, channel=Channel(Projection(head)).eval())
    with pytest.raises(ConfigError, match="takes 7 floating-point channels"):
        look(TRAIN, TEST, channel=Channel(Projection(nn.Linear(7, 2))).eval())


def test_few_persons_have_one_mark():
    train, test = part(400, 0, 0, 20), part(400, 1, 1000, 20)
    row = look(train, test).attributes[0]
    assert row.accuracy.value > 0.9
    assert row.marks == ("only 40 independent test items: no interval",)


def test_the_callers_mode_and_default_dtype_may_be_any():
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            row = look(TRAIN, TEST).attributes[0]
    finally:
        torch.set_default_dtype(torch.float32)
    assert row.accuracy.value > 0.9
