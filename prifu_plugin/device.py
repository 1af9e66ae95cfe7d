"""Where a module is, of what type its numbers are, and draws there that leave no trace."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from prifu_plugin.names import is_of_filter

CPU = torch.device("cpu")


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a module's first parameter or buffer; the CPU if it has none.

    Example:
        >>> device_of(nn.Linear(2, 2))
        device(type='cpu')
    """
    first: Tensor | None = next(itertools.chain(module.parameters(), module.buffers()), None)
    return CPU if first is None else first.device


def like_of(module: nn.Module) -> Tensor:
    """Return a tensor of the device and type that a module computes in: fp32 if it has none.

    Filters are in fp32 or better whatever the model is in, and are not asked.

    Example:
        >>> like_of(nn.Linear(2, 2).bfloat16()).dtype
        torch.bfloat16
    """
    named = itertools.chain(module.named_parameters(), module.named_buffers())
    own = (value for name, value in named if not is_of_filter(name))
    return next((value for value in own if value.is_floating_point()), torch.zeros(()))


@contextmanager
def seeded(seed: int, device: torch.device = CPU) -> Iterator[None]:
    """Draw with a seed on the CPU and a device, in a with block; others go on as they were.

    `torch.manual_seed` would seed every device, and what it did there would stay.

    Example:
        >>> torch.manual_seed(5).initial_seed()
        5
        >>> with seeded(0):
        ...     x = torch.rand(3)
        >>> with seeded(0):
        ...     torch.equal(x, torch.rand(3))
        True
        >>> torch.initial_seed()
        5
    """
    with torch.random.fork_rng(devices=[]), _seeded_there(seed, device):
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def _seeded_there(seed: int, device: torch.device) -> Iterator[None]:
    if device.type == "mps":  # one generator, of which fork_rng does not know
        state = torch.mps.get_rng_state()
        try:
            torch.mps.manual_seed(seed)
            yield
        finally:
            torch.mps.set_rng_state(state)
    elif _has_generators(device):
        home = torch.get_device_module(device.type)
        index = home.current_device() if device.index is None else device.index
        with torch.random.fork_rng(devices=[index], device_type=device.type):
            with home.device(index):
                home.manual_seed(seed)
            yield
    else:
        yield


def _has_generators(device: torch.device) -> bool:
    """Whether a device is an accelerator with generators that can be kept and put back."""
    if not torch.accelerator.is_available():
        return False
    there, home = torch.accelerator.current_accelerator(), torch.get_device_module()
    known = hasattr(home, "get_rng_state") and hasattr(home, "current_device")
    return there is not None and there.type == device.type and known
