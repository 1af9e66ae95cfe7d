"""The audit as a whole: floors, marks, references, bad input, what is written."""

import dataclasses
import io
import json
import re
import warnings
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn

import prifu_plugin as prifu
from prifu_plugin.audit import checks
from prifu_plugin.audit import request as audit_request
from prifu_plugin.audit import run as audit_run
from prifu_plugin.audit.controls import BROKEN, marks_of
from prifu_plugin.audit.data import AuditData, fingerprint
from prifu_plugin.audit.disjoint import check_disjoint, split_off
from prifu_plugin.audit.facts import facts_of
from prifu_plugin.audit.page import _bubbles, html
from prifu_plugin.audit.result import AuditReport
from prifu_plugin.audit.sending import (
    _varied,
    amplitude_for,
    answers_of,
    arrived,
    mean_of_queries,
)
from prifu_plugin.audit.statistics import Interval
from prifu_plugin.audit.words import upload_in_words, verdict
from prifu_plugin.channel import Channel, Noise, Projection, Quantizer
from prifu_plugin.cut import CutFilter
from prifu_plugin.errors import ConfigError, OrderError, PrifuWarning

pytestmark = pytest.mark.usefixtures("least_squares")


class Edge(nn.Module):
    """Uploads the mean colour of the left and of the right half."""

    def __init__(self, keep=(0, 1, 2, 3, 4, 5), noise=0.0):
        super().__init__()
        self.keep, self.noise = list(keep), noise

    def forward(self, x):
        halves = torch.stack([x[..., :4].mean((2, 3)), x[..., 4:].mean((2, 3))], 1).flatten(1)
        z = halves[:, self.keep]
        return z + self.noise * torch.randn_like(z)


def data(count=700, seed=0):
    """Images whose left red tells the task and left green a private bit; the right tells none."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.3 * torch.rand(count, 3, 8, 8, generator=generator)
    bits = torch.randint(2, (2, count), generator=generator)
    x[:, 0, :, :4] += 0.5 * bits[0][:, None, None]
    x[:, 1, :, :4] += 0.5 * bits[1][:, None, None]
    labels = {
        "task": bits[0],
        "private": bits[1],
        "coin": torch.randint(2, (count,), generator=generator),
    }
    return prifu.AuditData(x, labels)


TRAIN, TEST = data(700, 0), data(300, 1)


class Cloud(nn.Module):
    def forward(self, z):
        return torch.stack([0.4 - z[:, 0], z[:, 0] - 0.4], 1)


def run(edge, **settings):
    chosen = {"suite": "quick", "seeds": 1, "reconstruct": False, "cloud": Cloud().eval()}
    chosen |= {"task": "task", "attributes": ["private", "coin"], **settings}
    return prifu.audit(edge.eval(), TRAIN, TEST, **chosen)


def row_ceilings(report):
    return set(report.attributes[0].ceilings)


def rows(report):
    return {row.name: row for row in report.attributes}


@pytest.fixture(scope="module")
def plain():
    return run(Edge(), references={"untrained": Edge((3, 4, 5)).eval()}, name="plain")


def test_what_is_there_is_read_and_what_is_not_is_not(plain):
    found = rows(plain)
    assert found["private"].accuracy.value > 0.98
    assert found["private"].floor < 0.6
    assert verdict(found["private"]).startswith("leaks")
    assert abs(found["coin"].accuracy.value - 0.5) < 0.08
    assert plain.utility.value > 0.98
    assert found["private"].ceilings["untrained"] < 0.6
    assert found["private"].ceilings["input"] > 0.95
    assert not found["private"].marks
    assert plain.upload.values == 6
    assert plain.upload.bytes == 24


def test_a_defence_is_measured_against_the_plain_model(plain):
    defended = run(Edge((0,)), references={"plain": plain}, name="defended")
    found = rows(defended)
    assert found["private"].leak.low <= 0 <= found["private"].leak.high
    assert found["private"].ceilings["plain"] == rows(plain)["private"].accuracy.value
    assert found["private"].ceilings["input"] == rows(plain)["private"].ceilings["input"]
    again = run(Edge((0,)), references={"plain": Edge().eval()}, name="defended")
    assert rows(again)["private"].leak.value == pytest.approx(found["private"].leak.value, abs=0.05)
    assert found["coin"].leak is None
    assert found["coin"].leak_by_seed == ()
    shares = found["private"].leak_by_seed
    assert len(shares) == len(found["private"].seeds)
    assert sum(shares) / len(shares) == pytest.approx(found["private"].leak.value)
    assert prifu.AuditReport.from_json(defended.to_json()).attributes == defended.attributes
    assert "leak by seed" in defended.to_markdown()
    assert "reads nothing from the plain model" in found["coin"].marks[0]
    assert verdict(found["coin"]) == "no evidence either way"
    assert row_ceilings(defended) == {"plain", "untrained", "input"}


def test_a_channel_is_part_of_what_is_attacked():
    z = Edge()(TRAIN.images)
    channel = Channel(Noise(3.0, key=b"k" * 32), Quantizer(4).fit(z))
    report = run(Edge(), channel=channel)
    assert report.upload.bytes == 3
    assert not report.upload.stochastic
    assert rows(report)["private"].accuracy.value < 0.7


def test_fresh_noise_is_averaged_away():
    report = run(Edge(noise=0.6))
    assert report.upload.stochastic
    row = rows(report)["private"]
    assert row.repeated > 0.85
    assert row.accuracy.value == row.repeated
    assert row.winner.startswith("mean of repeated queries")


def test_an_attribute_that_is_the_task():
    report = run(Edge(), attributes=["task"])
    assert report.attributes[0].marks[0] == "it is the task itself"
    assert report.attributes[0].task_only > 0.98


def test_an_attribute_that_is_nearly_the_task():
    parts = []
    for part in (TRAIN, TEST):
        odd = torch.arange(len(part)) % 40 == 0
        alike = torch.where(odd, 1 - part.labels["task"], part.labels["task"])
        labels = {"task": part.labels["task"], "alike": alike}
        parts.append(prifu.AuditData(part.images, labels))
    settings = {"suite": "quick", "seeds": 1, "reconstruct": False}
    report = prifu.audit(Edge().eval(), *parts, task="task", attributes=["alike"], **settings)
    assert any("nearly the task itself" in mark for mark in report.attributes[0].marks)


@pytest.mark.parametrize("given", [{"references": {"plain": "plain.json"}}, {"cloud": 3}])
def test_references_that_are_none_are_refused(given):
    with pytest.raises(ConfigError, match="pass a module"):
        run(Edge(), **given)


def test_a_class_that_hardly_occurs_is_refused():
    rare = torch.zeros(len(TEST), dtype=torch.long)
    rare[:3] = 1
    test = prifu.AuditData(TEST.images, {**TEST.labels, "rare": rare})
    train = prifu.AuditData(TRAIN.images, {**TRAIN.labels, "rare": TRAIN.labels["coin"]})
    with pytest.raises(ConfigError, match="fewer than 4 items in test"):
        prifu.audit(Edge().eval(), train, test, task="task", attributes=["rare"], suite="quick")


def test_a_task_of_one_class_is_refused():
    test = prifu.AuditData(TEST.images, {**TEST.labels, "task": TEST.labels["task"] * 0})
    with pytest.raises(ConfigError, match="'task' has one class only in test"):
        prifu.audit(Edge().eval(), TRAIN, test, task="task", attributes=["coin"], suite="quick")


def test_a_cloud_that_begins_in_place_hides_nothing():
    class Signed(nn.Module):
        def forward(self, x):
            return Edge()(x)[:, :2] - 1.0  # all below 0: a rectifier leaves nothing

    cloud = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(2, 2)).eval()
    assert rows(run(Signed(), cloud=cloud))["private"].accuracy.value > 0.98


def test_a_projection_can_be_audited():
    torch.manual_seed(0)
    head = nn.Linear(6, 2)
    head.weight.data = torch.tensor([[1.0, 0, 0, 0, 0, 0], [-1.0, 0, 0, 0, 0, 0]])
    projection = Projection(head)
    report = run(Edge(), channel=Channel(projection), cloud=projection.server().eval())
    assert report.upload.bytes == 4
    assert rows(report)["private"].gain.low <= 0


def test_a_rare_attribute_is_judged_by_rank():
    generator = torch.Generator().manual_seed(0)

    def rare(data):
        chance = torch.rand(len(data), generator=generator)
        label = (chance < 0.03 + 0.12 * (data.images[:, 2].mean((1, 2)) > 0.15)).long()
        return changed(data, rare=label)

    train, test = rare(data(2000, 5)), rare(data(1500, 6))
    report = prifu.audit(
        Edge().eval(),
        train,
        test,
        task="task",
        attributes=["rare"],
        suite="quick",
        seeds=1,
        reconstruct=False,
    )
    row = report.attributes[0]
    assert row.gain.low <= 0
    assert row.auc.low > 0.5
    assert verdict(row).startswith("leaks")


def test_keyed_noise_is_asked_again():
    keyed = Channel(Noise(0.6, key=b"k" * 32))
    row = rows(run(Edge(), channel=keyed))["private"]
    assert row.repeated > max(0.85, row.once + 0.15)
    assert row.accuracy.value == row.repeated
    assert row.winner.startswith("mean of repeated queries")


@pytest.mark.slow
def test_the_full_suite_decodes_the_mean_of_repeated_queries():
    chosen = {"attributes": ["private"], "reconstruct": ["squared error"]}
    report = run(Edge(noise=1.5), suite="full", **chosen)
    decoders = report.reconstruction.decoders
    for name in ("least squares", "squared error"):
        assert decoders[f"{name}, mean of repeated queries"].psnr > decoders[name].psnr + 0.2
    assert "reconstruction from repeated queries" not in report.not_tested
    assert "mean of repeated queries" in report.to_html()


def test_nothing_of_the_users_is_changed():
    edge = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    channel = Channel(Noise(0.1, key=b"k" * 32)).train()
    run(edge, cloud=None, channel=channel, attributes=["private"])
    prifu.audit(edge, TRAIN, TEST, task="task", attributes=["private"], suite="quick", seeds=1)
    assert channel.training
    assert all(p.grad is None for p in edge.parameters())


@pytest.mark.parametrize("count", [60, 700])
def test_near_duplicates_are_refused(count):
    train = TRAIN.at(torch.arange(count))
    some = torch.arange(min(300, count))
    near = prifu.AuditData((train.images[some] + 1e-6).clamp(0, 1), TEST.at(some).labels)
    with pytest.raises(ConfigError, match="almost the same"):
        prifu.audit(Edge().eval(), train, near, task="task", attributes=["private"], suite="quick")


def test_a_constant_upload():
    report = run(Edge(()), cloud=None)
    row = rows(report)["private"]
    assert row.winner == "the prior"
    assert row.accuracy.value == pytest.approx(row.majority)
    assert report.utility is None
    assert report.upload.rank == 0
    assert any("constant" in mark for mark in row.marks)
    assert verdict(row) == "no evidence either way"
    again = AuditReport.from_json(report.to_json())
    assert again.upload.condition != again.upload.condition
    assert "nan" not in again.to_html()


def test_reconstruction_and_its_floors():
    report = run(Edge(), attributes=["private"], reconstruct=True)
    found = report.reconstruction
    assert found.best.psnr > found.task_mean.psnr + 1
    assert found.mean_image.psnr < found.task_mean.psnr
    assert 0 <= found.linkage <= 1
    assert found.search is None  # a quick look does not search
    assert AuditReport.from_json(report.to_json()) == report
    assert report.upload.bytes_as_image["jpeg"] > 0
    assert report.upload.bytes_as_float == 4 * 6
    assert "| floor: the mean image |" in report.to_markdown()
    assert "peak 1" in report.to_markdown()
    assert "as JPEG" in report.to_markdown()
    dark = (prifu.AuditData(part.images - 1, part.labels) for part in (TRAIN, TEST))
    with pytest.raises(ConfigError, match=r"values in \[0, 1\]"):
        prifu.audit(Edge().eval(), *dark, task="task", attributes=["private"], suite="quick")


def test_what_is_written_can_be_read(plain):
    text = plain.to_json()
    again = AuditReport.from_json(text)
    assert again == plain
    assert "right" not in json.loads(text)["attributes"][0]
    text = plain.to_markdown()
    row = plain.attributes[0]
    assert "| private |" in text
    assert f"| {row.balanced:.3f} | {row.auc} | {row.bits:.2f} | {row.majority:.3f} |" in text
    assert f"ceiling: {next(iter(row.ceilings))}" in text
    assert "suite quick" in text
    assert "Empirical" in str(plain)


def test_a_terminal_shows_tables(plain):
    console = Console(width=160, file=io.StringIO())
    console.print(plain)
    shown = console.file.getvalue()
    assert "private" in shown
    assert "| private |" not in shown


def test_the_page_stands_alone(plain):
    defended = run(Edge((0,)), references={"plain": plain}, reconstruct=True, name="<defended>")
    reference = run(Edge(), references={"plain": plain}, name="again")
    page = html([defended, reference], "A & B")
    assert "<script" not in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert "&lt;defended&gt;" in page
    assert "<title>A &amp; B</title>" in page
    assert page.count("<svg") >= 2
    assert len(page) < 2_000_000
    with pytest.raises(ConfigError, match="same attributes"):
        html([defended, run(Edge(), attributes=["coin"])])


def test_verdicts():
    row = rows(run(Edge(), attributes=["private"]))["private"]
    few = dataclasses.replace(row, accuracy=Interval(0.9, float("nan"), float("nan")))
    assert verdict(few) == "too few items to say"


def changed(data, **labels):
    return prifu.AuditData(data.images, {**data.labels, **labels})


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        (
            {"train": changed(TRAIN, private=torch.zeros(3).long())},
            ConfigError,
            "one class an image",
        ),
        ({"train": changed(TRAIN, private=torch.zeros(700).long())}, ConfigError, "one class only"),
        ({"train": changed(TRAIN, private=torch.zeros(700))}, ConfigError, "integers"),
        ({"test": changed(TEST, private=torch.zeros(300).long())}, ConfigError, "only in test"),
        ({"test": changed(TEST, private=TEST.labels["private"] * 2)}, ConfigError, "not in train"),
        ({"train": changed(TRAIN, other=torch.zeros(3).long())}, ConfigError, "'other' of train"),
        ({"attributes": ["age"]}, ConfigError, "has task, private, coin"),
        ({"test": TRAIN}, ConfigError, "700 images are in train and in test"),
        ({"edge": Edge().train()}, OrderError, "train mode"),
        ({"suite": "best"}, ConfigError, "standard, quick"),
        ({"test": TEST.at(torch.arange(10))}, ConfigError, "needs hundreds"),
    ],
)
def test_bad_input(settings, error, match):
    chosen = {"edge": Edge().eval(), "train": TRAIN, "test": TEST, "task": "task"}
    chosen = {**chosen, "attributes": ["private"], "suite": "quick", **settings}
    with pytest.raises(error, match=match):
        prifu.audit(chosen.pop("edge"), chosen.pop("train"), chosen.pop("test"), **chosen)


def test_uploads_that_are_not_finite():
    class Broken(nn.Module):
        def forward(self, x):
            return x.flatten(1).log() - x.flatten(1) / 0

    with pytest.raises(ConfigError, match="NaN or infinite"):
        run(Broken())


def test_few_items_are_marked():
    report = prifu.audit(
        Edge().eval(),
        TRAIN,
        TEST.at(torch.arange(40)),
        task="task",
        attributes=["private"],
        suite="quick",
        seeds=1,
        reconstruct=False,
    )
    assert any("no interval" in mark for mark in report.attributes[0].marks)


def marks(value, **changes):
    chosen = {"floor": torch.tensor([1.0, 0.0]).repeat(150), "ceilings": {"plain": 0.9}}
    chosen["ranked"] = False
    chosen |= {"permuted": 0.5, "half": value, "converged": True, "count": 300, **changes}
    return marks_of(Interval(value, value - 0.05, value + 0.05), **chosen)


@pytest.mark.parametrize(
    ("value", "changes", "expected"),
    [
        (0.9, {}, None),
        (0.52, {}, None),
        (0.52, {"ceilings": {"plain": 0.52}}, "nothing from the plain model"),
        (0.52, {"ceilings": {}}, "from nothing"),
        (0.52, {"ceilings": {"input": 0.9}}, "no plain model was attacked"),
        (0.9, {"ceilings": {}}, None),
        (0.52, {"permuted": 0.62}, "something is wrong"),
        (0.9, {"ceilings": {"plain": 0.9, "input": 0.6}}, "too weak for images"),
        (0.9, {"converged": False}, "still learning"),
        (0.9, {"half": 0.7}, "more data would read more"),
        (0.9, {"count": 40}, "no interval"),
    ],
)
def test_the_sanity_triple_and_other_marks(value, changes, expected):
    found = marks(value, **changes)
    assert (not found) if expected is None else any(expected in mark for mark in found)


def test_a_control_that_failed_overrides_what_was_read():
    row = rows(run(Edge(), attributes=["private"]))["private"]
    assert verdict(row).startswith("leaks")
    assert row.is_evidence
    broken = dataclasses.replace(row, marks=(BROKEN,))
    assert verdict(broken).startswith("no evidence")
    assert not broken.is_evidence


def test_a_verdict_by_auc_says_so():
    row = rows(run(Edge(), attributes=["private"]))["private"]
    assert verdict(row) == "leaks: read above the floor"
    ranked = dataclasses.replace(row, gain=Interval(0.0, -0.1, 0.1))
    assert verdict(ranked) == "leaks: ranked above the floor, by AUC"


@pytest.mark.parametrize(
    ("shape", "suite", "taken"),
    [
        ((2, 4, 3), "standard", "first"),
        ((14, 14, 48), "full", "last"),
        ((16, 16, 8), "standard", "last"),
        ((48, 14, 14), "standard", None),
        ((2, 4, 3), "quick", None),
        ((1, 1, 1), "standard", None),
        ((7, 9), "standard", None),
    ],
)
def test_a_guess_where_the_channels_are_is_said(shape, suite, taken):
    asked = SimpleNamespace(test=TEST, queries=1, suite=suite)
    said = audit_run._not_tested(asked, None, torch.randn(5, *shape))
    guesses = [left for left in said if "with channels elsewhere" in left]
    assert len(guesses) == (taken is not None)
    assert taken is None or f"in the {taken} dimension" in guesses[0]


def test_without_a_plain_model_a_low_figure_is_no_evidence():
    row = rows(run(Edge((0,)), attributes=["private"]))["private"]
    assert verdict(row) == "no evidence either way"


def test_reports_of_other_data_are_refused(plain):
    order = torch.randperm(300, generator=torch.Generator().manual_seed(3))
    with pytest.raises(ConfigError, match="another order"):
        prifu.audit(
            Edge().eval(), TRAIN, TEST.at(order), task="task", attributes=["private", "coin"],
            cloud=Cloud().eval(), suite="quick", seeds=1, reconstruct=False,
            references={"plain": plain},
        )  # fmt: skip


def test_an_edge_that_begins_in_place_changes_no_images():
    class InPlace(nn.Module):
        def forward(self, x):
            return x.mul_(2).mean((2, 3))

    before = TEST.images.clone()
    report = run(InPlace(), cloud=None, attributes=["private"])
    assert torch.equal(TEST.images, before)
    assert not report.upload.stochastic


@pytest.mark.slow
def test_the_bound_of_a_noisy_cut_is_reported():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    net = prifu.wrap(
        nn.Sequential(*layers), cut="4", noise=0.3, example_inputs=TEST.images[:2]
    ).eval()
    report = run(net, cloud=None, attributes=["private"])
    cut = net.get_submodule("4").prifu
    assert report.upload.bits == pytest.approx(float(cut.bits().sum()))
    assert report.upload.stochastic
    cut.key = bytes(32)
    assert not run(net, cloud=None, attributes=["private"]).upload.stochastic
    channel = Channel(Quantizer(2).fit(net(TRAIN.images)))
    assert run(net, cloud=None, attributes=["private"], channel=channel).upload.bits <= 8


def test_what_is_no_list_or_no_data_is_said():
    with pytest.raises(ConfigError, match=r"one string: pass attributes=\['private'\]"):
        run(Edge(), attributes="private")
    with pytest.raises(ConfigError, match="train is a Tensor: pass prifu_plugin.AuditData"):
        prifu.audit(Edge().eval(), TRAIN.images, TEST, task="task", attributes=["private"])


def test_missing_packages_are_named_before_the_work(monkeypatch):
    found = checks.find_spec
    monkeypatch.setattr(checks, "find_spec", lambda n: None if n == "sklearn" else found(n))
    with pytest.raises(ImportError, match=r"needs sklearn: pip install 'prifu_plugin\[audit\]'"):
        run(Edge(), suite="standard")
    monkeypatch.setattr(checks, "find_spec", lambda n: None)
    run(Edge(), attributes=["private"])  # quick, without reconstruction, needs neither


def test_versions_of_what_is_not_installed(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(audit_request, "version", missing)
    assert audit_request._version("scikit-learn") == "not installed"


def test_a_report_of_a_later_version_is_refused(plain):
    data = json.loads(plain.to_json())
    assert AuditReport.from_json(json.dumps(data)).name == plain.name
    with pytest.raises(ConfigError, match=r"audit has format 99.*Upgrade"):
        AuditReport.from_json(json.dumps(data | {"format": 99}))


class Constant(nn.Module):
    def forward(self, x):
        return torch.ones(len(x), 4)


def test_nothing_is_read_from_a_constant_upload():
    for seed in (1, 2, 4, 7):
        g = torch.Generator().manual_seed(seed)
        names = ("task", "coin")
        given = {name: torch.randint(2, (600,), generator=g) for name in names}
        both = prifu.AuditData(torch.rand(600, 1, 2, 2, generator=g), given)
        halves = both.at(torch.arange(300)), both.at(torch.arange(300, 600))
        settings = {"suite": "quick", "seeds": 1, "reconstruct": False}
        report = prifu.audit(
            Constant().eval(), *halves, task="task", attributes=["coin"], **settings
        )
        assert verdict(report.attributes[0]) == "no evidence either way"


def test_keyed_noise_is_averaged_over_varied_queries():
    def read(key):
        net = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Identity())
        edge = prifu.wrap(nn.Sequential(net, nn.BatchNorm1d(3)), cut="0", noise=0.03,
                          example_inputs=TRAIN.images[:4])  # fmt: skip
        edge.get_submodule("0.prifu").key = key
        found = prifu.audit(edge[0].eval(), TRAIN, data(1500, 1), task="task", seeds=1, queries=4,
                            attributes=["private"], suite="quick", reconstruct=False)  # fmt: skip
        return found.upload, found.attributes[0].repeated

    upload, averaged = read(bytes(range(32)))
    assert not upload.stochastic
    assert averaged == pytest.approx(read(None)[1], abs=0.06)
    assert averaged > 0.65


def test_uploads_that_are_no_real_vectors(plain):
    def edge(function):
        class Made(Edge):
            def forward(self, x):
                return function(super().forward(x))

        return Made()

    with pytest.raises(ConfigError, match="are complex.*view_as_real"):
        run(edge(lambda z: z.to(torch.complex64)))
    with pytest.raises(ConfigError, match=r"\(N, \.\.\.\) of one shape"):
        run(edge(lambda z: z[:, 0]))
    with pytest.raises(ConfigError, match="one shape"):
        run(edge(lambda z: z[:, : 1 + len(z) % 2]))
    with pytest.warns(PrifuWarning, match="float64, attackers read them as float32"):
        run(edge(lambda z: z.double() + 1e-9), attributes=["private"])


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ([0, 1] * 350, "is a list: pass torch.tensor"),
        (torch.arange(700) + 10**9, "number the classes from 0"),
    ],
)
def test_labels_that_are_no_classes(label, said):
    train = prifu.AuditData(TRAIN.images, {**TRAIN.labels, "private": label})
    with pytest.raises(ConfigError, match=said):
        prifu.audit(Edge().eval(), train, TEST, task="task", attributes=["private"])


def test_an_edge_that_is_no_module():
    with pytest.raises(ConfigError, match="edge is a function"):
        prifu.audit(lambda x: x, TRAIN, TEST, task="task", attributes=["private"])


def test_bits_are_bounded_only_where_the_noise_is_what_is_sent():
    images = torch.rand(2, 3, 16, 16)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    net = prifu.wrap(net, cut="2", noise=0.3, example_inputs=images).eval()
    there, behind = (prifu.split(net, at, images).edge for at in ("2", "3"))
    (cut,) = (m for m in there.modules() if isinstance(m, CutFilter))
    places = 14 * 14
    with torch.no_grad():
        bound = facts_of(there(images), there, None, images, True).bits
        assert facts_of(behind(images), behind, None, images, True).bits is None
    assert bound == pytest.approx(float(cut.bits().sum()) * places)


def test_a_cloud_that_is_broken_is_refused():
    class Broken(nn.Module):
        def forward(self, z):
            return torch.full((len(z), 2), torch.nan)

    with pytest.raises(ConfigError, match="NaN or infinite logits"):
        answers_of(Broken(), torch.zeros(4, 3), torch.zeros(4))


def test_rare_classes_are_in_both_parts_of_a_split():
    label = torch.zeros(400, dtype=torch.long)
    label[:4] = 1
    for seed in range(20):
        data = AuditData(torch.arange(400.0)[:, None], {"rare": label})
        parts = split_off(data, 0.25, seed, ["rare"])
        assert all(part.labels["rare"].any() for part in parts)
        assert sum(len(part) for part in parts) == 400


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"seeds": 2.0}, "seeds=2.0 is no whole number"),
        ({"queries": None}, "queries=None is no whole number"),
        ({"queries": 0}, "at least 1"),
        ({"reconstruct": "squared error"}, "is one string"),
        ({"channel": Quantizer(4)}, "channel is a Quantizer: pass .*Channel"),
        ({"train": prifu.AuditData(TRAIN.images, None)}, "labels of train are a NoneType"),
        ({"train": prifu.AuditData(TRAIN.images[..., :4], TRAIN.labels)}, "bring them to one"),
    ],
)
def test_arguments_are_checked_before_the_work(settings, match):
    chosen = {"train": TRAIN, "test": TEST, "task": "task", "attributes": ["private"], **settings}
    with pytest.raises(ConfigError, match=match):
        prifu.audit(Edge().eval(), chosen.pop("train"), chosen.pop("test"), **chosen)


def test_images_that_the_edge_refuses():
    edge = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval()
    doubled = [prifu.AuditData(part.images.double(), part.labels) for part in (TRAIN, TEST)]
    with pytest.raises(ConfigError, match="refuses images of shape .* torch.float64"):
        prifu.audit(edge, *doubled, task="task", attributes=["private"], reconstruct=False)


def test_flags_are_labels():
    flags = [changed(part, private=part.labels["private"].bool()) for part in (TRAIN, TEST)]
    settings = {"task": "task", "attributes": ["private"], "suite": "quick", "seeds": 1}
    found = prifu.audit(Edge().eval(), *flags, reconstruct=False, **settings)
    assert found.attributes[0].accuracy.value > 0.9


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32, "0 to 255"])
def test_images_are_varied_in_their_own_units(kind):
    images = TRAIN.images
    if kind != torch.float32:
        images = (images * 255).round()
    images = images.to(torch.uint8) if kind == torch.uint8 else images
    noise = Channel(Noise(1.0, key=bytes(32)))
    amplitude = amplitude_for(nn.Flatten().eval(), noise, images)
    unit = 1.0 if kind == torch.float32 else 255.0
    assert 1e-3 * unit <= amplitude * 1.2 <= 8e-2 * unit
    varied = _varied(images, 6.4e-2 * unit, torch.Generator().manual_seed(0))
    assert varied.dtype == images.dtype
    assert 0.03 < float((varied.float() - images.float()).abs().mean()) / unit < 0.15


def test_what_is_rounded_is_asked_again():
    torch.manual_seed(0)
    channel = Channel(Quantizer(1).fit(torch.tensor([[0.0, 1.0]])))
    images = torch.full((64, 3, 8, 8), 0.3)
    images += 0.25 * torch.arange(64)[:, None, None, None] / 64
    edge = Edge().eval()
    once, truth = arrived(edge, channel, images, "once"), edge(images)
    amplitude = amplitude_for(edge, channel, images)
    often = mean_of_queries(edge, channel, images, 400, amplitude)
    assert once.unique().numel() == 2
    told = [torch.corrcoef(torch.stack([z.mean(1), truth.mean(1)]))[0, 1] for z in (once, often)]
    assert told[1] > max(0.9, told[0] + 0.05)


def test_a_noisy_edge_is_audited_alike_with_the_same_seed():
    torch.manual_seed(1)
    first = run(Edge(noise=0.3), seed=3)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert run(Edge(noise=0.3), seed=3).to_json() == first.to_json()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_cloud_is_no_reference():
    with pytest.raises(ConfigError, match="'cloud' is not"):
        run(Edge(), references={"cloud": Edge().eval()})


class Linear(nn.Sequential):
    def __init__(self, *sizes):
        super().__init__(
            nn.Flatten(), *(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision_are_audited(dtype):
    torch.manual_seed(0)
    edge, cloud = Linear(192, 16).to(dtype).eval(), Linear(16, 8, 2).to(dtype).eval()
    parts = [prifu.AuditData(part.images.to(dtype), part.labels) for part in (TRAIN, TEST)]
    settings = {"task": "task", "attributes": ["private"], "cloud": cloud}
    report = prifu.audit(edge, *parts, suite="quick", seeds=1, reconstruct=True, **settings)
    assert rows(report)["private"].accuracy.value > 0.9


@pytest.mark.parametrize(
    ("answer", "what"),
    [(lambda z: {"logits": z}, "dict"), (lambda z: z[..., None], r"\(4, 3, 1\)")],
)
def test_a_cloud_that_returns_no_logits_is_said(answer, what):
    class Strange(nn.Module):
        def forward(self, z):
            return answer(z)

    with pytest.raises(ConfigError, match=f"The cloud returns {what}"):
        answers_of(Strange(), torch.zeros(4, 3), torch.zeros(4))


def test_images_may_be_views():
    wide = torch.rand(40, 8, 8, 3)
    views = [wide[..., 0].unsqueeze(1), torch.rand(40, 12)[:, ::2]]
    for images in views:
        data = prifu.AuditData(images, {"task": torch.arange(40) % 2})
        assert fingerprint(data) == fingerprint(prifu.AuditData(images.contiguous(), data.labels))
        check_disjoint(data.at(torch.arange(20)), data.at(torch.arange(20, 40)))


def test_attributes_may_come_from_a_generator():
    images = torch.rand(200, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(200) % 2
    data = prifu.AuditData(images, {"task": labels, "bright": labels.flip(0)})
    parts = data.at(torch.arange(120)), data.at(torch.arange(120, 200))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PrifuWarning)
        found = prifu.audit(
            nn.Flatten().eval(),
            *parts,
            task="task",
            attributes=(name for name in ["bright"]),
            suite="quick",
            seeds=1,
            queries=1,
            reconstruct=False,
        )
    assert [row.name for row in found.attributes] == ["bright"]


def numbers(count, seed, values=16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, values, generator=generator), torch.arange(count) % 2


def look(edge, train, test, **settings):
    chosen = {"task": "task", "attributes": ["private"], "seeds": 1, "reconstruct": False}
    return prifu.audit(edge.eval(), train, test, **{**chosen, **settings}).attributes[0]


def test_groups_are_persons_in_an_audit():
    def part(count, first, seed):
        z, task = numbers(count, seed)
        person = torch.arange(count) // 4
        private = (torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.5)[person]
        z[:, 0] += 1.5 * private
        return AuditData(z, {"task": task, "private": private.long()}, first + person)

    train, test = part(800, 0, 0), part(400, 1000, 1)
    settings = {"task": "task", "attributes": ["private"], "suite": "quick", "seeds": 1}
    edge = nn.Flatten().eval()
    found = prifu.audit(edge, train, test, reconstruct=False, **settings)
    assert found.settings["test groups"] == 100
    assert not any("persons" in left for left in found.not_tested)
    alone = [AuditData(part.images, part.labels) for part in (train, test)]
    without = prifu.audit(edge, *alone, reconstruct=False, **settings)
    assert any("same persons" in left for left in without.not_tested)

    def refused(message, train, test):
        with pytest.raises(ConfigError, match=message):
            prifu.audit(edge, train, test, reconstruct=False, **settings)

    refused("1 groups have images in train and in test, group 199", train, part(400, 199, 1))
    refused("test has no groups", train, alone[1])
    refused("train has no groups", alone[0], test)
    floats = AuditData(train.images, train.labels, train.groups.float())
    refused("groups of train are torch.float32", floats, test)
    few = AuditData(train.images, train.labels, torch.arange(800) % 3)
    refused("train shows 3 groups", few, test)
    short = AuditData(train.images, train.labels, train.groups[:5])
    refused(r"one integer an image, a tensor of \(800,\)", short, test)


@pytest.mark.parametrize("count", [5, 8, 40])
def test_an_attribute_that_few_test_images_have_is_judged_by_the_order_of_scores(count):
    def part(positives, seed):
        z, task = numbers(600, seed)
        private = torch.zeros(600, dtype=torch.long)
        private[:positives] = 1
        z[:, 0] += 4 * private
        return AuditData(z, {"task": task, "private": private})

    row = look(nn.Flatten(), part(40, 0), part(count, 1), suite="quick")
    assert row.auc.low > 0.6
    assert verdict(row).startswith("leaks")
    assert not any("from nothing" in mark for mark in row.marks)


@pytest.mark.parametrize("suite", ["quick", "standard"])
def test_constant_vectors_are_no_evidence(suite):
    class Constant(nn.Module):
        def forward(self, x):
            return torch.ones(len(x), 8)

    parts = [
        AuditData(x, {"task": task, "private": (x[:, 0] > 0).long()})
        for x, task in (numbers(300, 0), numbers(200, 1))
    ]
    row = look(Constant(), *parts, suite=suite, references={"plain": nn.Flatten().eval()})
    assert row.marks[0].startswith("the upload is constant")
    assert verdict(row) == "no evidence either way"


@pytest.mark.parametrize(
    "change",
    [lambda x: (255 * x).round() / 255, lambda x: x.bfloat16().float(), lambda x: (255 * x).byte()],
)
def test_copies_that_were_rounded_are_refused(change):
    images = TRAIN.images[:60]
    with pytest.raises(ConfigError, match="60 of 60 test images are almost the same"):
        check_disjoint(AuditData(images, {}), AuditData(change(images), {}))


def test_a_report_on_other_images_is_no_ceiling(plain):
    other = dataclasses.replace(plain, settings={**plain.settings, "data": "0" * 16})
    with pytest.raises(ConfigError, match="'input' was made of other data"):
        run(Edge(), references={"input": other})


def test_images_that_are_not_numbers_and_labels_that_are_complex():
    odd = TRAIN.images.clone()
    odd[0, 0, 0, 0] = float("nan")
    with pytest.raises(ConfigError, match="Images of train hold NaN"):
        look(Edge(), AuditData(odd, TRAIN.labels), TEST, suite="quick")
    labels = {**TRAIN.labels, "private": TRAIN.labels["private"].to(torch.complex64)}
    with pytest.raises(ConfigError, match="integers from 0"):
        look(Edge(), AuditData(TRAIN.images, labels), TEST, suite="quick")


def test_names_are_shown_as_they_are(plain):
    rows_ = tuple(dataclasses.replace(row, name=f"{row.name} $x^$ a|b") for row in plain.attributes)
    odd = dataclasses.replace(plain, name="_one $", attributes=rows_)
    reports = [odd, dataclasses.replace(odd, name="two")]
    legend = [text.get_text() for text in _bubbles(reports).legends[0].get_texts()]
    assert [text.partition(" (")[0] for text in legend] == [r"1 _one \$", "2 two"]
    assert html(reports)
    table = next(line for line in odd.to_markdown().splitlines() if "a\\|b" in line)
    assert table.count(" | ") > 3


@pytest.mark.parametrize("bits", [None, 8, 1])
def test_the_noise_of_a_channel_bounds_its_bits(bits):
    z = Edge()(TEST.images)
    steps = [Noise(0.3, key=b"k" * 32)] + ([Quantizer(bits).fit(z)] if bits else [])
    facts = facts_of(z, Edge().eval(), Channel(*steps), TEST.images, False)
    noisy = float(0.5 * (1 + z.double().var(0) / 0.09).log2().sum())
    assert facts.bits == pytest.approx(noisy if bits != 1 else min(noisy, 6.0))


def test_a_report_tells_all_that_was_tried_and_how_little_a_rank_of_few_images_says(plain):
    row = plain.attributes[0]
    assert row.winner in row.tried
    assert max(row.tried.values()) == row.tried[row.winner]
    again = AuditReport.from_json(plain.to_json())
    assert again.attributes[0].tried == row.tried
    assert "all that were tried" in plain.to_html()
    assert "rank 6" in upload_in_words(plain)
    few = dataclasses.replace(plain, sizes=(7, 7, 7))
    assert "rank at least 6" in upload_in_words(few)
