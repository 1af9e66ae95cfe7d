import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_ignore_collect(collection_path, config):
    """Leave the device lane to a process of its own, since it gives torch another device."""
    asked = config.getoption("markexpr") == "device"
    its_files = collection_path.name in ("test_device.py", "elsewhere.py")
    return True if its_files and not asked else None
