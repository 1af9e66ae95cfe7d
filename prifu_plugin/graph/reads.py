"""Which plain attributes a forward reads: numbers, flags and words, which a trace would freeze."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import nn

Reads = dict[tuple[str, str], Any]
"""(path of a module below the one that is traced, attribute) -> what it was."""


@contextmanager
def noting_reads(module: nn.Module) -> Iterator[Reads]:
    """Note what is read of a module and those inside it, and of what value, in a with block.

    Example:
        >>> net = nn.Dropout(0.25)
        >>> with noting_reads(net) as reads:
        ...     _ = net.p
        >>> reads
        {('', 'p'): 0.25}
    """
    reads: Reads = {}
    classes = {part: type(part) for part in module.modules()}
    try:
        for path, part in module.named_modules():
            if not isinstance(part, torch.jit.ScriptModule):
                part.__class__ = _noting(type(part), path, reads)
        yield reads
    finally:
        for part, cls in classes.items():
            part.__class__ = cls


def still_so(module: nn.Module, reads: Reads) -> bool:
    """Whether all that was read is what it was."""
    for (path, name), value in reads.items():
        try:
            owner: Any = module
            for part in path.split(".") if path else ():
                owner = owner._modules[part]
            now = getattr(owner, name)
        except (AttributeError, KeyError):  # gone
            return False
        if now is not value and (type(now) is not type(value) or now != value):
            return False
    return True


def _noting(cls: type[nn.Module], path: str, reads: Reads) -> type[nn.Module]:
    def read(self: nn.Module, name: str) -> Any:
        value = super(noting, self).__getattribute__(name)
        if name not in _OF_EVERY_MODULE and not name.startswith("__") and _is_plain(value):
            reads.setdefault((path, name), copy.copy(value))
        return value

    members = {"__getattribute__": read, "__module__": cls.__module__}
    noting: type[nn.Module] = type(cls.__name__, (cls,), members)
    noting.__qualname__ = cls.__qualname__
    return noting


_OF_EVERY_MODULE = set(nn.Module().__dict__) - {"training"}
"""What torch itself reads of each module."""

_PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, FunctionType)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list | set | frozenset):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return isinstance(value, _PLAIN)
