"""Arguments of public functions, checked at the edge: what was given, and what to give instead."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from prifu_plugin.errors import ConfigError


def check_model(model: Any, name: str = "model") -> None:
    """Raise ConfigError unless a model is a module.

    Example:
        >>> check_model(nn.Identity())
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{name} is {_shown(model)}: pass a torch.nn.Module.")


def number(name: str, value: Any) -> float:
    """Return a number as a float: of Python, numpy or a tensor of one, but not of text.

    Raises:
        ConfigError: for anything else.

    Example:
        >>> number("alpha", 1)
        1.0
    """
    try:
        if isinstance(value, str | bytes | bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ConfigError(f"{name}={value!r} is no number. Pass {name}= a float.") from None


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """Return an integer that is not below the least.

    Raises:
        ConfigError: for anything else.

    Example:
        >>> whole_number("steps", 3)
        3
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ConfigError(f"{name}={value!r} is no whole number. Pass {name}= an integer.")
    if int(value) < least:
        raise ConfigError(f"{name}={value!r}: pass {name}= an integer of at least {least}.")
    return int(value)


def tensors(name: str, value: Any) -> tuple[Tensor, ...]:
    """Return a tensor, or a tuple or list of them, as a tuple.

    Raises:
        ConfigError: for anything else.

    Example:
        >>> import torch
        >>> len(tensors("example_inputs", torch.zeros(2, 3)))
        1
    """
    listed = (value,) if isinstance(value, Tensor) else value
    if not isinstance(listed, tuple | list) or not all(isinstance(x, Tensor) for x in listed):
        given = isinstance(listed, tuple | list)
        odd = next((x for x in listed if not isinstance(x, Tensor)), None) if given else None
        what = f"holds {_shown(odd)}" if given else f"is {_shown(value)}"
        raise ConfigError(
            f"{name} {what}: pass a tensor, or a tuple of the tensors that forward takes, in its "
            "order."
        )
    return tuple(listed)


def strings(name: str, value: Any) -> tuple[str, ...] | None:
    """Return several strings as a tuple, whatever yields them; None stays None.

    Raises:
        ConfigError: for one string, or for anything else.

    Example:
        >>> strings("include", ["layer1"])
        ('layer1',)
    """
    if value is None:
        return None
    if isinstance(value, str):
        raise ConfigError(f"{name}='{value}' is one string: pass {name}=['{value}'].")
    listed = tuple(value) if isinstance(value, Iterable) else (value,)
    for item in listed:
        if not isinstance(item, str):
            raise ConfigError(
                f"{name} holds {_shown(item)}: pass a list of strings, paths or patterns."
            )
    return listed


def check_callable(name: str, value: Any, takes: str) -> None:
    """Raise ConfigError unless a value is None or can be called."""
    if value is not None and not callable(value):
        raise ConfigError(f"{name} is {_shown(value)}: pass a function of {takes}.")


def _shown(value: Any) -> str:
    if isinstance(value, str | int | float | type(None)):
        return repr(value)
    return f"a {type(value).__name__}"
