"""Patches of torch for the length of a trace: one thread patches, and it alone feels these."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

PATCHING = threading.RLock()
"""Held while anything is patched: of two threads the first would put back what the second made."""


@contextmanager
def patched(home: Any, name: str, mine: Any) -> Iterator[None]:
    """Replace a function of a module or class for this thread, in a with block.

    Args:
        home: module or class.
        name: of the function.
        mine: what this thread calls; others call what was there.

    Example:
        >>> import math
        >>> with patched(math, "sqrt", lambda x: "root"):
        ...     math.sqrt(4)
        'root'
        >>> math.sqrt(4)
        2.0
    """
    owner = threading.get_ident()
    with PATCHING:
        kept: Any = getattr(home, name, None)

        def choose(*args: Any, **kwargs: Any) -> Any:
            return (mine if threading.get_ident() == owner else kept)(*args, **kwargs)

        with mock.patch.object(home, name, choose, create=True):
            yield
