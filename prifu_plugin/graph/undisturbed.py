"""Undo what a forward pass stores on a model: attributes, lists, buffers."""

from __future__ import annotations

import copy
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
    attributes = [(module, dict(module.__dict__), _contents(module)) for module in modules]
    buffers = [(b, b._version, b.detach().clone()) for b in model.buffers()]
    try:
        yield
    finally:
        for module, before, contents in attributes:
            _restore(module.__dict__, before, keep)
            for container, items in contents:
                _refill(container, items)
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, version, value in buffers:
                # The kernels of batch norms update statistics and count no version.
                if buffer._version != version or _differs(buffer, value):
                    buffer.copy_(value)


def run_undisturbed(model: nn.Module, inputs: Sequence[Tensor]) -> Any:
    """Return what a model gives for copies of inputs; nothing of the run stays on it.

    Some forwards make a window smaller, for good, when an input is smaller than it.
    """
    with undisturbed(model), torch.no_grad():
        return model(*(x.clone() for x in inputs))


def _differs(buffer: Tensor, value: Tensor) -> bool:
    return not buffer.is_meta and not torch.equal(buffer, value)


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    """Return the containers of a module with copies of what they hold, None for nothing.

    Not its parameters: no forward replaces them but FSDP's, which keeps account of where they are.
    """
    return [
        (value, copy.copy(value) if value else None)
        for name, value in module.__dict__.items()
        if isinstance(value, list | dict | set) and name != "_parameters"
    ]


def _restore(now: dict[str, Any], before: dict[str, Any], keep: str | None) -> None:
    for name in set(now) - set(before):
        if keep is None or not name.startswith(keep):
            del now[name]
    for name, value in before.items():
        if name not in now or now[name] is not value:
            now[name] = value


def _refill(container: Any, items: Any) -> None:
    if items is None:
        if container:
            container.clear()
        return
    container.clear()
    if isinstance(container, list):
        container.extend(items)
    else:
        container.update(items)
