"""A model that fails on the way is a row with the reason, and the sweep goes on."""

import json
import subprocess
import sys
from pathlib import Path

import probe
import pytest
import sweep
import torch
from torch import nn

ROW = {"name": "a", "stands_for": ["a", "b"], "outcome": "exact", "input": [[2, 3, 8, 8]]}
CASES = [
    ("test_resnet", {}),
    ("no_such_model", {}),
    ("test_vit", {"gigabytes": 0.01}),
    ("resnet18", {"seconds": 1}),
    ("nfnet_l0", {}),
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Run all cases in a new process: the threads of autograd do not outlive a fork."""
    folder = tmp_path_factory.mktemp("rows")
    code = (
        f"import pathlib, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import sweep\n"
        f"for name, limits in {CASES!r}:\n"
        f"    sweep.run_apart(name, out=pathlib.Path({str(folder)!r}), **limits)\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True)
    assert done.returncode == 0, done.stderr
    return {name: json.loads((folder / f"{name}.json").read_text()) for name, _ in CASES}


def test_a_model_is_a_row(rows):
    row = rows["test_resnet"]
    assert row["outcome"] == "exact", row
    assert row["way"] == "graph"
    assert row["fp64"] <= 1e-11
    assert row["untrained"] == []
    assert row["macs"][1] < row["macs"][0]
    assert row["code"]


@pytest.mark.parametrize(
    ("name", "outcome", "why"),
    [
        ("no_such_model", "failed: RuntimeError", "Unknown model"),
        ("test_vit", "", ""),
        ("resnet18", "not finished", "more than 1 s of a core"),
        ("nfnet_l0", "refused: no normalization layer", "has no normalization layer"),
    ],
)
def test_what_fails_is_a_row(name, outcome, why, rows):
    row = rows[name]
    assert row["name"] == name
    assert row["outcome"].startswith(outcome or ("failed: ", "not finished"))
    assert why in row["why"]


def test_detectors_are_given_targets():
    model = sweep.build("tv_ssdlite320_mobilenet_v3_large").train()
    losses = model(*sweep.lesson(model, (torch.zeros(2, 3, 96, 96),)))
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_the_probe_tells_what_rests_from_what_is_constant():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Flatten()).double()
    net[0].bias.data.fill_(-1e6)
    net[0].weight.data[:2] = 0.0
    assert probe.least_share(net, (3, 4, 4)) == 0
    assert probe.least_share(net, (3, 4, 4), awake=True) == 0.5


def test_a_row_says_what_rests():
    row = {**ROW, "saved": 0.5, "possible": 0.6, "awake": 0.51}
    assert "0.980 if no activation were at rest" in sweep.page([row], {"torch": "0"})


def test_the_page_has_a_row_for_each_family():
    missing = {"name": "c", "stands_for": ["c"], "outcome": "not run"}
    lost = {**ROW, "name": "d", "saved": 0.5, "possible": 0.6, "constant": 0.04, "kept": []}
    text = sweep.page([ROW, missing, lost], {"torch": "0"})
    assert "3 families, which stand for 5 of" in text
    assert "| c | 1 |  | not run |" in text
    assert "4 % of what is left is constant" in text
    assert "- a: b" in text
