"""The HTML report in a browser: the same without scripts and requests, and not empty."""

import shutil
import subprocess

import pytest
import torch
from PIL import Image
from test_audit import Edge, run

from prifu_plugin.audit.page import html

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
QUIET = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine"),
]


NOTHING = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def picture(page, folder):
    """Return what a browser shows of a page, (H, W, 3)."""
    file = folder / f"{page.stem}.png"
    command = [BROWSER, *QUIET, f"--user-data-dir={folder / page.stem}", "--window-size=1000,2400",
               "--virtual-time-budget=3000", f"--screenshot={file}", page.as_uri()]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    shown = Image.open(file).convert("RGB")
    pixels = torch.frombuffer(bytearray(shown.tobytes()), dtype=torch.uint8)
    return pixels.view(shown.height, shown.width, 3)


def test_the_page_is_read_without_scripts_and_requests(tmp_path):
    plain = run(Edge(), reconstruct=True)
    defended = run(Edge((0,)), references={"plain": plain}, name="defended")
    text = html([plain, defended], "What does it upload?")
    (page := tmp_path / "report.html").write_text(text)
    policy = f'<head><meta http-equiv="Content-Security-Policy" content="{NOTHING}">'
    assert "<head>" in text
    (strict := tmp_path / "strict.html").write_text(text.replace("<head>", policy, 1))
    for _ in range(3):  # a busy machine may take a picture before all is drawn
        usual, without = picture(page, tmp_path), picture(strict, tmp_path)
        if same := torch.equal(usual, without):
            break
    assert same
    ink = (usual.amin(2) < 128).double().mean(1)
    assert (ink > 0).double().mean() > 0.3  # lines with something dark on them
