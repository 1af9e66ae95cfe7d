"""The format of what is kept in files: a later version's is refused rather than misread."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from prifu_plugin.errors import ConfigError, PrifuError

FORMAT = 1
"""Written into plans and reports; larger where an older reader would read something wrong."""


def read_format(text: str, what: str, keys: Sequence[str]) -> dict[str, Any]:
    """Read JSON text that holds what a plan or report needs.

    Raises:
        ConfigError: if it is another text, or a later version's.

    Example:
        >>> read_format('{"nodes": []}', "plan", ["nodes"])
        {'nodes': []}
    """
    try:
        data = json.loads(text)
        missing = [key for key in keys if key not in dict(data)]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"The {what} is not the text that to_json wrote: {error}.") from None
    if missing:
        raise ConfigError(f"The {what} has no '{missing[0]}': it is not the text of a {what}.")
    check_format(data, what)
    return dict(data)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Raise ConfigError, in a with block, for data that a plan or report would not hold.

    Example:
        >>> with reading("plan"):
        ...     {}["nodes"]
        Traceback (most recent call last):
        ...
        prifu_plugin.errors.ConfigError: The plan is damaged: KeyError 'nodes'. Write it again.
    """
    try:
        yield
    except PrifuError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        said = f"{type(error).__name__} {error}"
        raise ConfigError(f"The {what} is damaged: {said}. Write it again.") from error


def check_format(data: Mapping[str, Any], what: str) -> None:
    """Raise ConfigError if a later version wrote it; what names no format has the first.

    Example:
        >>> check_format({"format": 1}, "plan")
    """
    found = data.get("format", 1)
    if not isinstance(found, int | float):
        raise ConfigError(f"The {what} is damaged: its format is {found!r}. Write it again.")
    if found > FORMAT:
        raise ConfigError(
            f"The {what} has format {found}; this version of prifu_plugin reads up to {FORMAT}. "
            "Upgrade it: pip install --upgrade prifu_plugin."
        )
