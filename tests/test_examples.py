"""Each example runs, on little data."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.slow


def run(*arguments):
    finished = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=580
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_quickstart(tmp_path):
    out = run(EXAMPLES / "quickstart.py", "--smoke", "--out", tmp_path)
    assert "plain, projection" in out
    assert (tmp_path / "channels.png").stat().st_size > 10_000
    assert (tmp_path / "pruned.safetensors").exists()


@pytest.mark.parametrize("model", ["test_convnext", "mobilenetv3_small_050"])
def test_finetune_and_resume(model, tmp_path):
    arguments = [EXAMPLES / "finetune_timm.py", "--smoke", "--out", tmp_path, "--model", model]
    first = run(*arguments, "--epochs", "2")
    assert "epoch 1:" in first
    assert "pruned top-1" in first
    resumed = run(*arguments, "--resume", tmp_path / "last.pt")
    assert "epoch 1:" not in resumed
    assert "epoch 2:" in resumed


def test_image_folders(tmp_path):
    import torch
    from torchvision.utils import save_image

    for part in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(8):
                save_image(torch.rand(3, 40, 40), tmp_path / part / label / f"{i}.png")
    out = run(EXAMPLES / "finetune_timm.py", "--smoke", "--out", tmp_path / "out", "--data-dir",
              tmp_path, "--batch-size", 8)  # fmt: skip
    assert "pruned top-1" in out


def test_two_processes(tmp_path):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    out = run(*command, EXAMPLES / "distributed.py", "--smoke", "--out", tmp_path)
    assert out.count("channels open") == 1  # process 0 alone prints and writes
    assert [file.name for file in tmp_path.iterdir()] == ["wrapped.safetensors"]


def test_audit(tmp_path):
    out = run(EXAMPLES / "audit.py", "--smoke", "--out", tmp_path)
    assert "recommended, pooled" in out
    assert (tmp_path / "report.html").stat().st_size > 20_000
    assert (tmp_path / "plain_pooled.json").exists()


def test_cost():
    for name in ("cost", "relevance"):
        assert "resnet18" in run(EXAMPLES / "benchmarks" / f"{name}.py", "--smoke")


def test_prune_time():
    table = run(EXAMPLES / "benchmarks" / "prune_time.py", "--models", "test_resnet")
    assert "| test_resnet |" in table


@pytest.mark.long
def test_suites():
    table = run(EXAMPLES / "benchmarks" / "suites.py", "--smoke")
    assert "| plain | pooled | 0 | digit |" in table


def test_insertion_table():
    table = run(EXAMPLES / "benchmarks" / "insertion.py").splitlines()
    assert all(row.split("|")[-2].strip() == "yes" for row in table[2:])
    design = (EXAMPLES.parent / "docs" / "design.md").read_text()
    assert all(row in design for row in table)
