"""A model that fails on the way is a row with the reason, and the sweep goes on."""

import json

import pytest
import sweep

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
ROW = {"name": "a", "stands_for": ["a", "b"], "outcome": "exact", "input": [[2, 3, 8, 8]]}


def row_of(name, folder, **limits):
    sweep.run_apart(name, out=folder, **limits)
    return json.loads((folder / f"{name}.json").read_text())


def test_a_model_is_a_row(tmp_path):
    row = row_of("test_resnet", tmp_path)
    assert row["outcome"] == "exact"
    assert row["way"] == "graph"
    assert row["fp64"] <= 1e-11
    assert row["untrained"] == []
    assert row["macs"][1] < row["macs"][0]
    assert row["code"]


@pytest.mark.parametrize(
    ("name", "limits", "outcome", "why"),
    [
        ("no_such_model", {}, "failed: RuntimeError", "Unknown model"),
        ("test_resnet", {"gigabytes": 0.01}, "failed: ", "memory"),
        ("resnet18", {"seconds": 1}, "not finished", "more than 1 s of a core"),
        ("nfnet_l0", {}, "refused: no normalization layer", "has no normalization layer"),
    ],
)
def test_what_fails_is_a_row(name, limits, outcome, why, tmp_path):
    row = row_of(name, tmp_path, **limits)
    assert row["name"] == name
    assert row["outcome"].startswith(outcome)
    assert why in row["why"]


def test_the_page_has_a_row_for_each_family():
    missing = {"name": "c", "stands_for": ["c"], "outcome": "not run"}
    lost = {**ROW, "name": "d", "saved": 0.5, "possible": 0.6, "constant": 0.04, "kept": []}
    text = sweep.page([ROW, missing, lost], {"torch": "0"})
    assert "3 families, which stand for 5 of" in text
    assert "| c | 1 |  | not run |" in text
    assert "4 % of what is left is constant" in text
    assert "- a: b" in text
