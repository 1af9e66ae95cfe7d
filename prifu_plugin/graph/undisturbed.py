"""Undo what a forward pass stores on a model: attributes, lists, buffers."""

from __future__ import annotations

import copy
import operator
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def undisturbed(model: nn.Module, keep: str | None = None) -> Iterator[None]:
    """Restore the modes, attributes and buffers of all modules behind a with block.

    A traced forward would otherwise leave proxies in what it assigns to self.

    Args:
        model: any module.
        keep: prefix of new attributes to keep.
    """
    modules = list(model.modules())
    modes = [(module, module.training) for module in modules]
    attributes = [(module, dict(module.__dict__)) for module in modules]
    empty, filled, tensors = _held(modules)
    buffers = [(b, _version(b), b.detach().clone()) for b in model.buffers()]
    try:
        yield
    finally:
        for module, before in attributes:
            _restore(module.__dict__, before, keep)
        for container in empty:
            if container:
                container.clear()
        for container, items in filled:
            _refill(container, items)
        for module, training in modes:
            if module.training is not training:
                module.training = training
        with torch.no_grad():
            for tensor, version, value in tensors:
                if _version(tensor) != version:
                    tensor.copy_(value)
            for buffer, version, value in buffers:
                # The kernels of batch norms update statistics and count no version.
                if _version(buffer) != version or _differs(buffer, value):
                    buffer.copy_(value)


def run_undisturbed(model: nn.Module, inputs: Sequence[Tensor]) -> Any:
    """Return what a model gives for copies of inputs; nothing of the run stays on it.

    Some forwards make a window smaller, for good, when an input is smaller than it.
    """
    with undisturbed(model), torch.no_grad():
        return model(*(x.clone() for x in inputs))


def _differs(buffer: Tensor, value: Tensor) -> bool:
    return not buffer.is_meta and not torch.equal(buffer, value)


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was written to; those of inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version


def _held(
    modules: Sequence[nn.Module],
) -> tuple[list[Any], list[tuple[Any, Any]], list[tuple[Tensor, int, Tensor]]]:
    """Return empty containers, others with copies of what they hold, and tensors likewise.

    Not parameters: no forward replaces them but FSDP's, which keeps account of where they are. Nor
    buffers, which batch norms change in a way of their own.
    """
    empty: list[Any] = []
    filled: list[tuple[Any, Any]] = []
    tensors: list[tuple[Tensor, int, Tensor]] = []
    seen = {id(buffer) for module in modules for buffer in module._buffers.values()}
    left = [
        value
        for module in modules
        for name, value in module.__dict__.items()
        if type(value) not in _PLAIN and name != "_parameters"
    ]
    while left:
        value = left.pop()
        if not isinstance(value, _HOLDING) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if not isinstance(value, nn.Parameter):
                tensors.append((value, _version(value), value.detach().clone()))
        elif not value:
            empty.append(value)
        else:
            filled.append((value, copy.copy(value)))
            left += value.values() if isinstance(value, dict) else value
    return empty, filled, tensors


_PLAIN = {bool, int, float, str, type(None), tuple}
_HOLDING = (dict, list, set, deque, Tensor)


def _restore(now: dict[str, Any], before: dict[str, Any], keep: str | None) -> None:
    if list(before) == list(now) and all(map(operator.is_, before.values(), now.values())):
        return
    for name in set(now) - set(before):
        if keep is None or not name.startswith(keep):
            del now[name]
    for name, value in before.items():
        if name not in now or now[name] is not value:
            now[name] = value


def _refill(container: Any, items: Any) -> None:
    container.clear()
    if isinstance(container, list | deque):
        container.extend(items)
    else:
        container.update(items)
