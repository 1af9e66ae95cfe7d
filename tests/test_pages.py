"""The code that README and the pages of the documentation show runs as it stands."""

import re
import warnings
from pathlib import Path

import pytest
import timm
import torch

import prifu_plugin as prifu

ROOT = Path(__file__).parents[1]


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)


def make_model():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=2)


def batches(count=3):
    torch.manual_seed(0)
    return [(torch.rand(16, 3, 32, 32), torch.arange(16) % 2) for _ in range(count)]


def data(count, seed, *names):
    g = torch.Generator().manual_seed(seed)
    bits = torch.randint(2, (3, count), generator=g)
    x = 0.5 * torch.rand(count, 3, 32, 32, generator=g)
    x[:, 0, :16] += 0.4 * bits[0][:, None, None]
    x[:, 1, :, :16] += 0.4 * bits[1][:, None, None]
    names = names or ("smiling", "glasses", "beard")
    return prifu.AuditData(x, dict(zip(names, bits, strict=False)))


def wrapped(**settings):
    model = prifu.wrap(make_model(), example_inputs=batches(1)[0][0], **settings).eval()
    with torch.no_grad():
        for unit in prifu.filters(model).values():
            unit.weight[::2] = 0.0
        for module in model.modules():  # as training leaves it
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.normal_(1, 0.1)
    return model


def test_readme(monkeypatch):
    monkeypatch.setattr(prifu, "audit", quick(prifu.audit))
    first, second = blocks("README.md")
    page = {"rates": [0.1] * 20}
    exec(first.replace('"resnet18"', '"test_resnet"'), page)
    page |= {"images": batches(1)[0][0], "train": data(120, 0), "test": data(60, 1)}
    exec(second, page)
    assert isinstance(page["small"], torch.fx.GraphModule)


def test_training():
    (code,) = blocks("docs/training.md")
    page = {"prifu": prifu, "torch": torch, "model": make_model(), "rates": [0.1] * 20}
    exec(code, page)
    assert prifu.filters(page["model"])


@pytest.mark.slow
def test_audit(monkeypatch):
    monkeypatch.setattr(prifu, "audit", quick(prifu.audit))
    first, second = blocks("docs/audit.md")
    page = {"model": wrapped(), "images": batches(1)[0][0], "torch": torch}
    exec(first, page)
    page |= {"train": data(120, 0), "test": data(60, 1), "channel": None}
    page["plain_edge"] = prifu.split(make_model().eval(), "layer2", page["images"]).edge
    written = []
    page["open"] = lambda name, mode: Sink(written)
    exec(second, page)
    assert written[0].startswith("<!doctype html>")


class Sink:
    def __init__(self, written):
        self.write = written.append


def quick(audit):
    def run(*arguments, **settings):
        return audit(*arguments, suite="quick", seeds=1, reconstruct=False, **settings)

    return run


def test_rivals(monkeypatch):
    monkeypatch.setattr(prifu, "audit", quick(prifu.audit))
    (code,) = blocks("docs/rivals.md")
    train, test = data(120, 0, "task", "private"), data(60, 1, "task", "private")
    page = {"prifu_plugin": prifu, "model": make_model(), "x": batches(1)[0][0]}
    page |= {"images": train.images, "task": train.labels["task"], "test": test, "train": train}
    exec(code.replace("epochs=12", "epochs=1"), page | {"private": train.labels["private"]})


@pytest.mark.export
def test_deploy(tmp_path):
    made = batches()
    page = {"model": wrapped(cut="global_pool", noise=0.3), "make_model": make_model}
    page |= {"train": made[:2], "val": made[2:], "folder": tmp_path}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own libraries, and of chance
        for code in blocks("docs/deploy.md"):
            exec(code, page)
    assert len(page["wire"]) == page["sent"][0].numel() // 2
    assert page["answer"].shape == (1, 2)
    assert (tmp_path / "edge.onnx").exists()
