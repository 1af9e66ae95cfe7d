import gc

import pytest
import torch

from prifu_plugin.audit import inference
from prifu_plugin.audit.attackers import ridge


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_collection_finish():
    """Let the garbage collector, and wrap's search for wrappers, pass over what imports made."""
    gc.freeze()


def pytest_ignore_collect(collection_path, config):
    """Leave the device lane to a process of its own, since it gives torch another device."""
    asked = config.getoption("markexpr") == "device"
    its_files = collection_path.name in ("test_device.py", "elsewhere.py")
    return True if its_files and not asked else None


@pytest.fixture(scope="module")
def least_squares():
    """Attack by least squares alone, which is cheap: attackers have tests of their own."""
    every = inference._attackers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "_attackers", lambda *of: [a for a in every(*of) if a is ridge])
        yield
