"""Audits of one defence, trained several times."""

import dataclasses
import statistics

import pytest
import torch

import prifu_plugin as prifu
from prifu_plugin.audit.statistics import Interval
from prifu_plugin.errors import ConfigError

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.rand(300, 1, 8, 8, generator=GENERATOR)
SECRET = torch.arange(300) % 2
IMAGES[SECRET == 1] += 0.2
DATA = prifu.AuditData(IMAGES, {"task": (IMAGES[:, 0, 0, 0] > 0.6).long(), "bright": SECRET})


def changed(report, name, **of_row):
    row = dataclasses.replace(report.attributes[0], **of_row)
    return dataclasses.replace(report, name=name, attributes=(row,))


@pytest.fixture(scope="module")
def reports():
    parts = DATA.at(torch.arange(200)), DATA.at(torch.arange(200, 300))
    settings = {"task": "task", "attributes": ["bright"], "suite": "quick", "seeds": 1}
    found = prifu.audit(torch.nn.Flatten().eval(), *parts, reconstruct=False, **settings)
    assert found.attributes[0].accuracy.low > 0.9
    nothing = {"accuracy": Interval(0.51, 0.45, 0.57), "gain": Interval(0.01, -0.05, 0.07)}
    nothing |= {"auc": Interval(0.5, 0.45, 0.55), "marks": ()}
    return [
        changed(found, "seed 0", leak=Interval(0.9, 0.8, 1.0)),
        changed(found, "seed 1", leak=Interval(0.1, -0.1, 0.2), **nothing),
    ]


def test_figures_are_those_of_the_reports(reports):
    found = prifu.over_seeds([prifu.AuditReport.from_json(r.to_json()) for r in reports])
    (row,) = found.attributes
    assert row.accuracy == (reports[0].attributes[0].accuracy.value, 0.51)
    assert row.leak == (0.9, 0.1)
    assert row.read == 1
    assert found == prifu.over_seeds(reports)
    text = found.to_markdown()
    assert f"| bright | {statistics.mean(row.accuracy):.3f} |" in text
    assert f"| 0.500 ± {statistics.stdev((0.9, 0.1)):.3f} | 0.900, 0.100 |" in text
    assert "| 1 of 2 |" in text
    assert "2 networks: seed 0, seed 1." in text


def test_what_is_not_known_is_left_open(reports):
    row = dataclasses.replace(reports[1].attributes[0], leak=None)
    told = dataclasses.replace(reports[0], utility=Interval(0.9, 0.8, 1.0))
    found = prifu.over_seeds([told, dataclasses.replace(reports[1], attributes=(row,))])
    assert found.utility == (0.9, None)
    assert found.attributes[0].leak[1] is None
    assert "0.900, none" in found.to_markdown()
    assert "nan" not in found.to_markdown()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda r: r[:1], "two seeds or more"),
        (lambda r: [r[0], "report"], "got a str"),
        (lambda r: [r[0], dataclasses.replace(r[1], task="other")], "differ in their task"),
        (lambda r: [r[0], dataclasses.replace(r[1], attributes=())], "differ in their attributes"),
        (
            lambda r: [r[0], dataclasses.replace(r[1], settings={**r[1].settings, "data": "x"})],
            "differ in their data",
        ),
    ],
)
def test_reports_that_cannot_be_compared_are_refused(reports, change, match):
    with pytest.raises(ConfigError, match=match):
        prifu.over_seeds(change(reports))
