"""The paper's experiments run on little data, and committed pages follow from committed runs."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scipy import stats

import prifu_plugin as prifu

ROOT = Path(__file__).parents[1]
PAPER = ROOT / "examples" / "paper"
RESULTS = ROOT / "docs" / "results" / "paper"
sys.path.insert(0, str(PAPER))

from lab import plans, tables  # noqa: E402
from lab.forms import filtered  # noqa: E402
from lab.intervals import over_seeds, over_seeds_and_images  # noqa: E402
from lab.networks import build  # noqa: E402
from lab.pages import gathered, verdict  # noqa: E402
from lab.runs import key_of, packed, run_of, unpacked  # noqa: E402
from lab.scale import Scale  # noqa: E402

from prifu_plugin.audit.statistics import Interval  # noqa: E402

slow = pytest.mark.slow


def run(names, *arguments):
    """Run scripts one after the other in one new process, which imports and reads data once."""
    code = (
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(PAPER)!r})\n"
        f"for name in {names.split()!r}:\n"
        f"    sys.argv = [name, *{[str(a) for a in arguments]!r}]\n"
        f"    runpy.run_path({str(PAPER)!r} + '/' + name + '.py', run_name='__main__')\n"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@slow
@pytest.mark.parametrize(
    "names", ["table1 fig4 fig11", pytest.param("fig6 fig7", marks=pytest.mark.long)]
)
def test_figures_that_train_run(names, tmp_path):
    said = run(names, "--smoke", "--out", tmp_path)
    for name in names.split():
        assert f"{name}-smoke.md" in said
        page = (tmp_path / f"{name}-smoke.md").read_text()
        for line in page.splitlines():
            if line.startswith("!["):
                assert (tmp_path / line.split("(")[1].rstrip(")")).stat().st_size > 2000


@slow
@pytest.mark.timeout(1500)
def test_tables_of_attacks_run_and_are_resumed(tmp_path):
    shown = {
        "table2": "| PriFU, alpha 0.0 |",
        "table3": "| vgg, PriFU |",
        "fig3": "| plain, keep 0.1, order avgri |",
        "fig8": "| PriFU, alpha 0.6 |",
        "table6": "| PriFU |",
    }
    run(" ".join(("comparison", *shown)), "--smoke", "--out", tmp_path)
    first = (tmp_path / "comparison-smoke.md").read_text()
    for method in ("CI", "MaxEnt-ARL", "RAN", "PAN", "DISCO", "CFB", "NoPeek-Infer", "Shredder"):
        assert f" | {method}," in first, method
    for name, row in shown.items():
        assert row in (tmp_path / f"{name}-smoke.md").read_text(), name
    run("comparison", "--smoke", "--out", tmp_path)  # seconds: all runs are stored
    assert (tmp_path / "comparison-smoke.md").read_text() == first


@slow
@pytest.mark.timeout(1500)
def test_forms_of_the_filter_run(tmp_path):
    run("finetune", "--smoke", "--out", tmp_path)
    page = (tmp_path / "finetune-smoke.md").read_text()
    assert "| PriFU, preserved, affine absorbed, gain to 1.0 |" in page


TABLES = ["comparison", "table2", "table3", "fig3", "fig8", "table6", "finetune"]


@slow
@pytest.mark.timeout(1500)
def test_committed_pages_follow_from_committed_runs(tmp_path):
    there = [name for name in TABLES if (RESULTS / f"{name}-cpu.md").exists()]
    run(" ".join(there), "--scale", "cpu", "--cached", "--out", tmp_path)
    for name in there:
        page = f"{name}-cpu.md"
        assert (tmp_path / page).read_text() == (RESULTS / page).read_text(), name


def test_the_page_of_claims_follows_from_the_pages(tmp_path):
    scale = Scale("cpu")
    for page in RESULTS.glob("*-cpu.md"):
        (tmp_path / page.name).write_text(page.read_text())
    (tmp_path / "claims-cpu.md").unlink()
    scale.results = tmp_path
    gathered(scale)
    assert (tmp_path / "claims-cpu.md").read_text() == (RESULTS / "claims-cpu.md").read_text()


def test_runs_are_known_by_all_that_could_change_them():
    scale, other = Scale("cpu"), Scale("cpu")
    other.values["schedule"] = {**other.values["schedule"], "epochs": 13}
    run = run_of(scale, "CI", 0, strength=0.3, named="colour")
    same = run_of(scale, "CI", 0, named="colour", strength=0.3)
    assert key_of(run, scale) == key_of(same, scale)
    assert key_of(run, scale) != key_of(run, other)
    assert key_of(run, scale) != key_of({**run, "seed": 1}, scale)


@pytest.mark.parametrize("affine", ["free", "frozen", "absorbed"])
def test_forms_begin_as_the_network_they_are_given(affine):
    images = torch.rand(4, 3, 32, 32)
    plain = build("resnet", 2, 0)
    for module in plain.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.weight)
            torch.nn.init.normal_(module.bias)
    before = plain.eval()(images).detach()
    settings = {"form": "preserved", "affine": affine, "alpha": 0.0}
    wrapped = filtered(plain, "", images, settings, 640, Scale("cpu")).eval()
    torch.testing.assert_close(wrapped(images), before, rtol=0, atol=1e-4)
    moving = [m.weight.requires_grad for m in wrapped.modules()
              if isinstance(m, torch.nn.BatchNorm2d)]  # fmt: skip
    assert all(moving) if affine == "free" else not any(moving)


def test_outcomes_survive_packing():
    outcomes = torch.randint(3, (1000,)).double() / 2
    assert torch.equal(unpacked(packed(outcomes, 2), 2), outcomes)


def test_leaks_of_made_up_results():
    """A method that is read half as well above the floor leaks half; the plain one leaks all."""
    right = {"plain": torch.ones(400), "half": (torch.arange(400) % 4 < 3).double()}
    floor = (torch.arange(400) % 4 < 2).double()
    results = []
    for method, outcome in right.items():
        row = {"name": "s", "marks": [], "accuracy": {}, "repeated": None}
        report = {"attributes": [row], "utility": {"value": 0.9, "low": 0.88, "high": 0.92},
                  "settings": {"attack seeds": 1}, "reconstruction": None,
                  "upload": {"bytes": 4}}  # fmt: skip
        packs = {"once": packed(outcome), "strongest": packed(outcome), "floor": packed(floor)}
        made = {
            "data": "d",
            "network": "n",
            "cut": "c",
            "method": method,
            "settings": {},
            "seed": 0,
        }
        results.append({"run": made, "report": report, "outcomes": {"s": packs}})
    plain, half = tables.lines(results)
    assert plain.cells["s"].leak.value == pytest.approx(1)
    assert half.cells["s"].leak.value == pytest.approx(0.5)
    assert half.cells["s"].leak.low < 0.5 < half.cells["s"].leak.high
    assert half.mean_leak(("s",)) == pytest.approx(50)


def test_plans_name_every_rival_at_every_cut_and_the_scale_of_the_paper_loads():
    for scale in (Scale("cpu"), Scale("paper")):
        for cut in scale["cuts"]:
            methods = {run["method"] for run in plans.comparison(scale, cut)}
            assert {"CI", "MaxEnt-ARL", "RAN", "PAN", "DISCO", "CFB", "NoPeek-Infer"} <= methods
        assert json.dumps(scale.values)


def made(method, right, floor, seed=0, utility=0.9, **settings):
    """A result whose attack is right on given test images."""
    report = {
        "attributes": [{"name": "s", "marks": [], "accuracy": {}, "repeated": None}],
        "utility": {"value": utility, "low": utility - 0.02, "high": utility + 0.02},
        "settings": {"attack seeds": 1},
        "reconstruction": None,
        "upload": {"bytes": 4},
    }
    outcome = {"once": packed(right), "strongest": packed(right), "floor": packed(floor)}
    run = {"data": "d", "network": "n", "cut": "c", "method": method}
    run |= {"settings": settings, "seed": seed}
    return {"run": run, "report": report, "outcomes": {"s": outcome}}


def test_differences_of_leaks_resample_seeds_and_need_something_to_leak():
    g = torch.Generator().manual_seed(0)
    floor = torch.zeros(800, dtype=torch.double)

    def draw(share):
        return (torch.rand(800, generator=g) < share).double()

    results = [made("plain", draw(0.9), floor, s) for s in (0, 1, 2)]
    results += [made("steady", draw(0.3), floor, s) for s in (0, 1, 2)]
    results += [made("loose", draw(share), floor, s) for s, share in enumerate((0.05, 0.75, 0.3))]
    plain, steady, loose = tables.lines(results)
    sure = tables.difference_of_leaks(steady, plain, ("s",))
    assert sure.high < 0
    assert sure.value == pytest.approx(-100 * 2 / 3, abs=6)
    unsure = tables.difference_of_leaks(steady, loose, ("s",))
    assert unsure.low < 0 < unsure.high  # its seeds differ more than its images
    nothing = tables.lines([made("plain", floor, floor), made("other", floor, floor)])
    assert math.isnan(tables.difference_of_leaks(*nothing, ("s",)).value)


def test_what_is_above_the_floor_has_an_interval_over_images_and_seeds():
    g = torch.Generator().manual_seed(0)

    def cells(*shares):
        draws = [(torch.rand(600, generator=g) < share).double() for share in shares]
        floor = (torch.arange(600) % 2).double()
        return [tables.lines([made("m", d, floor, s) for s, d in enumerate(draws)])[0].cells["s"]]

    much, less = cells(0.9, 0.9), cells(0.6, 0.6)
    assert tables.above_floor(much).value == pytest.approx(40, abs=3)
    found = tables.above_floor(much, less)
    assert found.low < found.value < found.high
    assert found.low > 15
    one, two = tables.above_floor(cells(0.7, 0.7)), tables.above_floor(cells(0.5, 0.9))
    assert two.high - two.low > 1.5 * (one.high - one.low)  # seeds that differ widen it
    same = tables.above_floor(much, much)
    assert same.low == same.value == same.high == 0  # of the same seeds and images


def test_seeds_that_did_not_learn_are_left_out_and_named():
    floor, right = torch.zeros(400).double(), torch.ones(400).double()
    results = [made("plain", right, floor, s) for s in (0, 1)]
    results += [made("A", floor, floor, 0, utility=0.5), made("A", right, floor, 1)]
    results += [made("B", floor, floor, 0, utility=0.5)]
    _, a, b = tables.lines(results)
    assert (a.seeds, a.cells["s"].leak.value) == (1, pytest.approx(1))
    assert a.marks == ("did not learn the task with seed 0, left out",)
    assert b.marks == ("did not learn the task with seed 0",)


def test_the_audit_page_follows_from_its_reports():
    folder = ROOT / "docs" / "results"
    text = (folder / "audit.md").read_text()
    reports = sorted((folder / "audit").glob("*.json"))
    assert len(reports) == text.count("\n## ") == 6
    for file in reports:
        assert prifu.AuditReport.from_json(file.read_text()).to_markdown().strip() in text, file


def test_a_seed_that_not_every_setting_has_run_is_left_out():
    scale = Scale("cpu")
    results = [
        {"run": run_of(scale, method, seed, cut="early")}
        for seed, methods in ((0, ("plain", "CI")), (1, ("plain", "CI")), (2, ("plain",)))
        for method in methods
    ]
    kept = tables.of_whole_seeds(results)
    assert {result["run"]["seed"] for result in kept} == {0, 1}
    assert len(kept) == 4
    assert tables.of_whole_seeds([]) == []


def test_intervals_over_seeds_are_students():
    ours, theirs = {0: 0.5, 1: 0.9, 2: 0.4, 7: 3.0}, {0: 0.1, 1: 0.3, 2: 0.2, 5: 9.0}
    alone = stats.ttest_1samp(list(ours.values()), 0.0).confidence_interval(0.95)
    found = over_seeds(ours)
    assert (found.low, found.high) == pytest.approx((alone.low, alone.high))
    paired = stats.ttest_rel([0.5, 0.9, 0.4], [0.1, 0.3, 0.2]).confidence_interval(0.95)
    found = over_seeds(ours, theirs)  # of the seeds that both have
    assert (found.low, found.high) == pytest.approx((paired.low, paired.high))
    assert found.value == pytest.approx(0.4)
    one = over_seeds({3: 1.5})
    assert one.value == 1.5
    assert math.isnan(one.low)


def test_intervals_over_seeds_and_images_add_both_errors():
    g = torch.Generator().manual_seed(0)
    rows = (torch.rand(3, 400, generator=g) < torch.tensor([[0.4], [0.5], [0.6]])).double()

    def mean(seeds, images):
        return float(rows[seeds][:, images].mean())

    found = over_seeds_and_images(mean, 3, 400)
    seeds = stats.ttest_1samp(rows.mean(1).numpy(), 0.0).confidence_interval(0.95)
    images = 1.96 * float(rows.mean(0).std(correction=0)) / 400**0.5
    reach = math.hypot((seeds.high - seeds.low) / 2, images)
    assert found.value == pytest.approx(float(rows.mean()))
    assert found.high - found.value == pytest.approx(reach, rel=0.02)
    assert found.value - found.low == pytest.approx(reach, rel=0.02)
    one = over_seeds_and_images(mean, 1, 400)
    assert one.value == pytest.approx(float(rows[0].mean()))
    assert math.isnan(one.low)


def test_a_difference_of_attacks_is_of_the_same_seeds_and_images():
    g = torch.Generator().manual_seed(0)
    floor = torch.zeros(500, dtype=torch.double)
    hard = [(torch.rand(500, generator=g) < 0.6).double() for _ in range(3)]
    easy = [torch.maximum(h, (torch.rand(500, generator=g) < 0.5).double()) for h in hard]
    results = [made("hard", h, floor, s) for s, h in enumerate(hard)]
    results += [made("easy", e, floor, s) for s, e in reversed(list(enumerate(easy)))]
    a, b = (line.cells["s"] for line in tables.lines(results))
    found = tables.difference_of_accuracies(a, b)
    assert found.value == pytest.approx(-20, abs=4)
    assert -32 < found.low < found.value < found.high < -8


@pytest.mark.parametrize(("given", "bounds", "said"), [
    ([(-3, -5, -1)], {}, "- Holds"),
    ([(3, 1, 5)], {}, "- **Does not hold**"),
    ([(-3, -5, -1), (1, -1, 3)], {}, "- Not shown"),
    ([(-3, -5, -1), (3, 1, 5)], {}, "- **Does not hold**"),
    ([(3, 1, 5)], {"below": 6.0}, "- Holds"),
    ([(3, 1, 5)], {"above": 0.0}, "- Holds"),
    ([(3, 1, 5)], {"above": 6.0}, "- **Does not hold**"),
    ([(3, 1, 5)], {"above": 2.0}, "- Not shown"),
    ([(1, math.nan, math.nan)], {}, "- Not shown"),
    ([], {}, "- Not shown"),
])  # fmt: skip
def test_a_claim_holds_fails_or_is_not_shown(given, bounds, said):
    line = verdict([Interval(*one) for one in given], "so it is:", "", 3, **bounds)
    assert line.startswith(f"{said}, 3 seeds: so it is:")
