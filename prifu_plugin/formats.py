"""The format of what is kept in files: a later version's is refused rather than misread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prifu_plugin.errors import ConfigError

FORMAT = 1
"""Written into plans and reports; larger where an older reader would read something wrong."""


def check_format(data: Mapping[str, Any], what: str) -> None:
    """Raise ConfigError if a later version wrote it; what names no format has the first.

    Example:
        >>> check_format({"format": 1}, "plan")
    """
    found = data.get("format", 1)
    if found > FORMAT:
        raise ConfigError(
            f"The {what} has format {found}; this version of prifu_plugin reads up to {FORMAT}. "
            "Upgrade it: pip install --upgrade prifu_plugin."
        )
