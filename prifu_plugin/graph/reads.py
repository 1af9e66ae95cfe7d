"""What a forward reads of its module, which a trace would freeze, and changes, which it loses."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from enum import Enum
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prifu_plugin.errors import CaptureError

Reads = dict[tuple[str, str], Any]
"""(path of a module below the one that is traced, attribute) -> what it was."""
ABSENT, CHILD_IS_THERE = object(), object()
"""Of an attribute that was asked for and not there, and of a module."""


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
            now = _fields_of(getattr(owner, name, ABSENT))
        except KeyError:  # gone
            return False
        if value is CHILD_IS_THERE:
            if not isinstance(now, nn.Module):
                return False
        elif now is not value and (type(now) is not type(value) or now != value):
            return False
    return True


def held(module: nn.Module) -> dict[str, Any]:
    """Return what a module and those inside it hold, by name: which a trace must leave as it is."""
    found: dict[str, Any] = {}
    for path, part in module.named_modules():
        for name, value in part.__dict__.items():
            where = f"{path}.{name}".lstrip(".")
            found[where] = value
            if isinstance(value, list | tuple | set | deque):
                found[f"an item of {where}"] = tuple(value)
            elif isinstance(value, dict) and name != "_modules":
                found.update({f"{where}['{key}']": item for key, item in value.items()})
            else:
                found[f"the values in {where}"] = _inside(value)
    versions = ((f"buffer {name}", b._version) for name, b in module.named_buffers())
    return {**found, **dict(versions)}


def check_unchanged(module: nn.Module, before: dict[str, Any]) -> None:
    """Raise CaptureError if a module holds something else than `held` said before."""
    after = held(module)
    for name in [*before, *after]:
        was, now = before.get(name, _NOTHING), after.get(name, _NOTHING)
        if was is now or (type(was) is type(now) and _same_items(was, now)):
            continue
        if "_tensor_constant" in name:
            raise CaptureError("it makes tensors of its own")
        raise CaptureError(f"it changes {name}, which its graph would not")


def _inside(value: Any) -> Any:
    """Return what shows that a tensor, an array or a generator of its own was changed in place."""
    if isinstance(value, Tensor):
        return None if value.is_inference() else value._version
    if isinstance(value, np.ndarray):
        return hash(value.tobytes())
    if isinstance(value, torch.Generator):
        return hash(bytes(value.get_state().numpy()))
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    return str(value.getstate()) if isinstance(value, random.Random) else None


def _same_items(was: Any, now: Any) -> bool:
    if isinstance(was, tuple):
        return len(was) == len(now) and all(a is b for a, b in zip(was, now, strict=True))
    return isinstance(was, int | float | str) and bool(was == now)


_NOTHING = object()


def _noting(cls: type[nn.Module], path: str, reads: Reads) -> type[nn.Module]:
    def read(self: nn.Module, name: str) -> Any:
        value = super(noting, self).__getattribute__(name)
        if name not in _OF_EVERY_MODULE and not name.startswith("__") and _is_plain(value):
            reads.setdefault((path, name), copy.deepcopy(_fields_of(value)))
        return value

    def look_for(self: nn.Module, name: str) -> Any:
        """Note children, and what is not there: "if self.norm" and getattr with a default."""
        try:
            value = super(noting, self).__getattr__(name)  # type: ignore[misc]
        except AttributeError:
            reads.setdefault((path, name), ABSENT)
            raise
        if isinstance(value, nn.Module):
            reads.setdefault((path, name), CHILD_IS_THERE)
        elif value is None:
            reads.setdefault((path, name), None)
        return value

    members = {
        "__getattribute__": read,
        "__getattr__": look_for,
        "__module__": cls.__module__,
    }
    noting: type[nn.Module] = type(cls.__name__, (cls,), members)
    noting.__qualname__ = cls.__qualname__
    return noting


def _fields_of(value: Any) -> Any:
    """Return the fields of a dataclass, which need not be equal to a copy of itself."""
    if is_dataclass(value) and not isinstance(value, type):
        return type(value), [(part.name, getattr(value, part.name)) for part in fields(value)]
    return value


_OF_EVERY_MODULE = set(nn.Module().__dict__) - {"training"}
"""What torch itself reads of each module."""

_PLAIN = (
    *(type(None), bool, int, float, complex, str, Enum, torch.dtype, torch.device),
    *(FunctionType, BuiltinFunctionType),
)


def _is_plain(value: Any) -> bool:
    if is_dataclass(value) and not isinstance(value, type):
        return all(_is_plain(getattr(value, part.name)) for part in fields(value))
    if isinstance(value, tuple | list | set | frozenset):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return isinstance(value, _PLAIN)
