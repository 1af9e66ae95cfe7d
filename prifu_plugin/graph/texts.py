"""Texts that a forward makes of proxies: harmless in assertions, decisions anywhere else."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any

_MARK = re.compile(r"\x02(\d+):(\w+)\x03")


class Texts:
    """Stand-ins for the texts of one trace, numbered in the order in which they are made.

    What is made for the message of an assertion alone decides nothing. Any other text may be
    looked up: as the key of a dict, or the name of an attribute.

    Args:
        told: numbers of the texts that are to be the true ones.

    Attributes:
        pending: number -> name of the node, of stand-ins that no assertion has taken so far.

    Example:
        >>> texts = Texts()
        >>> message = "height " + texts.write("getitem", lambda: "40")
        >>> texts.pending
        {0: 'getitem'}
        >>> texts.taken(message), texts.pending
        ('height {getitem}', {})
    """

    def __init__(self, told: Collection[int] = ()) -> None:
        self._told = frozenset(told)
        self._count = 0
        self.pending: dict[int, str] = {}

    def write(self, name: str, true: Callable[[], str]) -> str:
        """Return a stand-in, or the true text, which decides, where it was asked for.

        Args:
            name: of the node.
            true: makes the text itself.
        """
        number, self._count = self._count, self._count + 1
        if number in self._told:
            return true()
        self.pending[number] = name
        return f"\x02{number}:{name}\x03"

    def taken(self, message: Any) -> Any:
        """Return the message of an assertion with names for stand-ins, which do not pend longer."""
        if not isinstance(message, str):
            return message
        for number, _ in _MARK.findall(message):
            self.pending.pop(int(number), None)
        return _MARK.sub(r"{\2}", message)
