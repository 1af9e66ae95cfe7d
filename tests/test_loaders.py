"""Loaders of public data sets, on tiny files in the official formats."""

import pytest
import torch
from PIL import Image

from prifu_plugin.data.celeba import load_celeba
from prifu_plugin.data.cifar10 import load_cifar10
from prifu_plugin.data.lfw import load_lfw
from prifu_plugin.errors import ConfigError


@pytest.fixture
def cifar(tmp_path):
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        records = bytearray()
        for k in range(4):
            label = (4 * i + k) % 10
            records += (
                bytes([label]) + bytes([label * 25]) * 1024 + bytes(1024) + bytes([255]) * 1024
            )
        (tmp_path / f"{name}.bin").write_bytes(records)
    return tmp_path


def test_cifar10(cifar):
    data = load_cifar10(cifar, train=True)
    assert data.images.shape == (20, 3, 32, 32)
    assert data.labels["class"].tolist()[:12] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert data.labels["living"].tolist()[:10] == [0, 0, 1, 1, 1, 1, 1, 1, 0, 0]
    assert torch.allclose(data.images[3, :, 0, 0], torch.tensor([75 / 255, 0, 1]))
    assert len(load_cifar10(cifar, train=False)) == 4


def test_cifar10_damaged(cifar, tmp_path):
    (cifar / "test_batch.bin").write_bytes(b"abc")
    with pytest.raises(ConfigError, match="cut off"):
        load_cifar10(cifar, train=False)
    (cifar / "test_batch.bin").unlink()
    with pytest.raises(ConfigError, match="is missing: unpack"):
        load_cifar10(cifar, train=False)
    (cifar / "test_batch.bin").write_bytes(bytes([77]) + bytes(3072))
    with pytest.raises(ConfigError, match="not CIFAR-10"):
        load_cifar10(cifar, train=False)


def picture(file, colour, size=(178, 218)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(file)


@pytest.fixture
def celeba(tmp_path):
    names = ["5_o_Clock_Shadow", "Male", "Smiling", "Young"]
    rows = [[-1, 1, 1, -1], [1, -1, -1, 1], [-1, -1, 1, 1], [1, 1, -1, -1]]
    lines = ["4", " ".join(names)]
    for i, row in enumerate(rows, 1):
        lines.append(f"{i:06d}.jpg  " + "  ".join(f"{v}" for v in row))
        picture(tmp_path / "img_align_celeba" / f"{i:06d}.jpg", (60 * i, 0, 0))
    (tmp_path / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
    parts = ["0", "0", "1", "2"]
    partition = "\n".join(f"{i:06d}.jpg {p}" for i, p in enumerate(parts, 1))
    (tmp_path / "list_eval_partition.txt").write_text(partition + "\n")
    return tmp_path


def test_celeba(celeba):
    data = load_celeba(celeba, "train", size=48)
    assert data.images.shape == (2, 3, 48, 48)
    assert data.labels["Smiling"].tolist() == [1, 0]
    assert data.labels["Male"].tolist() == [1, 0]
    assert data.labels["Young"].tolist() == [0, 1]
    assert data.images[1, 0].mean() == pytest.approx(120 / 255, abs=0.02)
    assert len(load_celeba(celeba, "test", size=48)) == 1
    assert len(load_celeba(celeba, "train", size=48, most=1)) == 1


def test_celeba_with_the_list_of_persons(celeba):
    assert load_celeba(celeba, "train", size=48).groups is None
    file = celeba / "identity_CelebA.txt"
    file.write_text("".join(f"{i:06d}.jpg {p}\n" for i, p in enumerate((2880, 77, 5, 5), 1)))
    assert load_celeba(celeba, "train", size=48).groups.tolist() == [2880, 77]
    file.write_text("000001.jpg 2880\n")
    with pytest.raises(ConfigError, match="does not name 000002.jpg"):
        load_celeba(celeba, "train", size=48)


def test_celeba_incomplete(celeba):
    with pytest.raises(ConfigError, match="train, validation, test"):
        load_celeba(celeba, "val")
    with pytest.raises(ConfigError, match="no attribute 'Old'"):
        load_celeba(celeba, "train", attributes=("Old",))
    (celeba / "img_align_celeba" / "000002.jpg").unlink()
    with pytest.raises(ConfigError, match="in the list but missing"):
        load_celeba(celeba, "train")
    attributes = celeba / "list_attr_celeba.txt"
    attributes.write_text("\n".join(attributes.read_text().splitlines()[:-1]))
    with pytest.raises(ConfigError, match="cut off"):
        load_celeba(celeba, "train")
    attributes.unlink()
    with pytest.raises(ConfigError, match="list_attr_celeba.txt is missing"):
        load_celeba(celeba, "train")


@pytest.fixture
def lfw(tmp_path):
    lines = ["# attributes v1.0", "#\tperson\timagenum\tPale Skin\tSmiling\tYouth"]
    for i in range(60):
        person = f"Person Number{i}"
        for number in (1, 2):
            scores = [1.5 if i % 2 else -0.5, 0.3 if number == 1 else -0.3, -1.0]
            lines.append("\t".join([person, str(number), *map(str, scores)]))
            name = person.replace(" ", "_")
            picture(tmp_path / name / f"{name}_{number:04d}.jpg", (0, 4 * i, 0), (250, 250))
    (tmp_path / "lfw_attributes.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_lfw_divides_persons(lfw):
    train, test = load_lfw(lfw, train=True, size=48), load_lfw(lfw, train=False, size=48)
    assert len(train) + len(test) == 120
    assert len(test) == 32  # the paper's share, 32.04 of 120 images, two a person
    greens = [
        set((d.images[:, 1].mean((1, 2)) * 255 / 4).round().int().tolist()) for d in (train, test)
    ]
    assert not greens[0] & greens[1]
    assert not set(train.groups.tolist()) & set(test.groups.tolist())
    assert len(test.groups.unique()) == 16
    assert train.labels["Smiling"].float().mean() == 0.5
    assert train.labels["Youth"].sum() == 0
    with pytest.raises(ConfigError, match="no attribute 'Old'"):
        load_lfw(lfw, train=True, attributes=("Old",))
    (lfw / "lfw_attributes.txt").unlink()
    with pytest.raises(ConfigError, match="is missing"):
        load_lfw(lfw, train=True)
