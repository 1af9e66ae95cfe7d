"""Texts that a forward makes of proxies: harmless where they are said, decisions elsewhere."""

from __future__ import annotations

import builtins
import logging
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import fx

from prifu_plugin.graph.patches import patched

_MARK = re.compile(r"\x02(\d+):(\w+)\x03")


class Texts:
    """Stand-ins for the texts of one trace, numbered in the order in which they are made.

    What an assertion, a log or print says decides nothing. Any other text may be looked
    up: as the key of a dict, or the name of an attribute.

    Args:
        told: numbers of the texts that are to be the true ones.

    Attributes:
        pending: number -> name of the node, of stand-ins that nobody has said so far.

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
        """Return what is said with names for stand-ins, which do not pend longer."""
        if not isinstance(message, str):
            return message
        for number, _ in _MARK.findall(message):
            self.pending.pop(int(number), None)
        return _MARK.sub(r"{\2}", message)

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Note what is logged and printed in a with block; warnings tell frames apart."""

        def hear(kept: Any) -> Callable[..., Any]:
            def say(*given: Any, **settings: Any) -> Any:
                words = (str(one) if isinstance(one, fx.Proxy) else one for one in given)
                return kept(*map(self.taken, words), **settings)

            return say

        with ExitStack() as stack:
            for home, name in _SAYING:
                stack.enter_context(patched(home, name, hear(getattr(home, name))))
            yield


_LEVELS = ("debug", "info", "warning", "error", "exception", "critical", "log")
_SAYING = (
    *((logging.Logger, name) for name in _LEVELS),
    (builtins, "print"),
)
