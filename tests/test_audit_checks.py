"""What an audit is given: references, groups, clouds and channels that fit, or do not."""

import pytest
import torch
from torch import nn

import prifu_plugin as prifu
from prifu_plugin import AuditData
from prifu_plugin.audit.checks import _is_elsewhere, _some_values
from prifu_plugin.channel import Channel, Projection
from prifu_plugin.errors import ConfigError

EDGE = nn.Flatten().eval()
SETTINGS = {"task": "task", "attributes": ["s"], "seeds": 1, "reconstruct": False}

pytestmark = pytest.mark.usefixtures("least_squares")


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


@pytest.mark.parametrize(
    "prepare", [lambda z: z * 255, lambda z: (z - 0.5) / 0.225, lambda z: z + 20]
)
def test_images_on_two_scales_are_refused(prepare):
    other = AuditData(prepare(TEST.images), TEST.labels)
    with pytest.raises(ConfigError, match="Prepare both alike"):
        look(TRAIN, other)


def log_normal(count, seed):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)).mul(2).exp()


ALIKE = {
    "an outlier": lambda: (TRAIN.images.clone().index_fill_(1, torch.tensor([2]), 0.0), None),
    "heavy tails": lambda: (log_normal(300, 0), log_normal(150, 1)),
    "sparse": lambda: ((TRAIN.images > 2.9).float(), (TEST.images > 2).float()),
    "constant": lambda: (torch.ones(300, 6), torch.ones(150, 6) + 1e-3),
}


@pytest.mark.parametrize("what", ALIKE)
def test_images_on_one_scale_are_not_refused(what):
    train, test = ALIKE[what]()
    if test is None:
        train[3, 4], test = 1e3, TEST.images
    assert not _is_elsewhere(_some_values(train), _some_values(test))


def test_large_data_are_looked_at_in_part():
    assert len(_some_values(torch.zeros(3, dtype=torch.uint8).expand(10**6, 3))) == 100_000
