"""Convolutions of subclasses that only pad their input first, found by trial."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prifu_plugin.graph.undisturbed import undisturbed

_CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
_KNOWN: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def is_own_convolution(module: nn.Module) -> bool:
    """Whether a module is a convolution of a subclass with a forward of its own."""
    own = all(type(module).forward is not base.forward for base in _CONVOLUTIONS)
    return isinstance(module, tuple(_CONVOLUTIONS)) and own


def only_pads(module: nn.Module) -> bool:
    """Whether such a convolution is that of its weight on the input padded by zeros.

    As TensorFlow's "same" padding does: how much depends on the size of the input.

    Example:
        >>> class Padded(nn.Conv2d):
        ...     def forward(self, x):
        ...         return super().forward(F.pad(x, (1, 1, 1, 1)))
        >>> only_pads(Padded(3, 4, 3)), only_pads(nn.Conv2d(3, 4, 3))
        (True, False)
    """
    if module not in _KNOWN:
        _KNOWN[module] = is_own_convolution(module) and _agrees(module)
    return _KNOWN[module]


def _agrees(module: Any) -> bool:
    if module.padding_mode != "zeros":
        return False
    generator = torch.Generator().manual_seed(0)
    with undisturbed(module), torch.no_grad():
        for more in (0, 3):
            sizes = [3 * k * d + more + at for at, (k, d) in enumerate(_reach(module))]
            x = torch.randn(2, module.in_channels, *sizes, generator=generator)
            x = x.to(module.weight)
            try:
                found = module(x)
            except Exception:  # noqa: BLE001 - it is something else
                return False
            if not any(_same(found, candidate) for candidate in _candidates(module, x, found)):
                return False
    return True


def _candidates(module: Any, x: Tensor, found: Tensor) -> list[Tensor]:
    """Return the convolution of inputs padded to give that size, the odd pixel on either side."""
    pads = []
    for at, (kernel, dilation) in enumerate(_reach(module)):
        needs = (found.shape[2 + at] - 1) * module.stride[at] + (kernel - 1) * dilation + 1
        total = max(needs - x.shape[2 + at], 0)
        pads.append({(total // 2, total - total // 2), (total - total // 2, total // 2)})
    convolve = next(f for base, f in _CONVOLUTIONS.items() if isinstance(module, base))
    settings = module.stride, 0, module.dilation, module.groups
    return [
        convolve(
            F.pad(x, [n for pair in reversed(chosen) for n in pair]),
            module.weight,
            module.bias,
            *settings,
        )
        for chosen in itertools.product(*pads)
    ]


def _reach(module: Any) -> list[tuple[int, int]]:
    return list(zip(module.kernel_size, module.dilation, strict=True))


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    return bool((one - other).abs().max() <= 1e-4 * other.abs().max())
