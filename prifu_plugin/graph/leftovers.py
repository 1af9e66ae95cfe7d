"""What a traced forward leaves in caches of classes and of files: proxies, which are taken out.

What it leaves on modules themselves is undone by `undisturbed`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx, nn


@contextmanager
def no_leftovers(model: nn.Module) -> Iterator[None]:
    """Put back what stood where a trace has left proxies, behind a with block.

    Looks at the classes of all modules and the files of their forwards, and at the dicts, lists and
    sets there.

    Example:
        >>> class Remembers(nn.Module):
        ...     seen = {}
        ...     def forward(self, x):
        ...         return self.seen.setdefault("first", x)
        >>> with no_leftovers(Remembers()):
        ...     _ = fx.symbolic_trace(Remembers())
        >>> Remembers.seen
        {}
    """
    homes = list(_homes(model))
    before = [(home, dict(_names(home))) for home in homes]
    filled = [
        (container, container.copy())
        for _, names in before
        for container in names.values()
        if type(container) in (dict, list, set)
    ]
    try:
        yield
    finally:
        for container, items in filled:
            _put_back(container, items)
        for home, names in before:
            _restore(home, names)


def _homes(model: nn.Module) -> Iterator[Any]:
    """Yield classes, and the names of files as dicts."""
    seen: set[int] = set()
    for kind in {type(module) for module in model.modules()}:
        for cls in kind.__mro__:
            if cls.__module__.startswith("torch.") or cls in (object, nn.Module):
                continue
            forward = inspect.unwrap(cls.__dict__.get("forward", cls))
            for home in (cls, getattr(forward, "__globals__", None)):
                if home is not None and id(home) not in seen:
                    seen.add(id(home))
                    yield home


def _names(home: Any) -> Any:
    return home if isinstance(home, dict) else vars(home)


def _holds_proxy(value: Any, depth: int = 2) -> bool:
    if isinstance(value, fx.Proxy):
        return True
    if depth == 0 or type(value) not in (dict, list, set, tuple):
        return False
    items = [*value, *value.values()] if isinstance(value, dict) else value
    return any(_holds_proxy(item, depth - 1) for item in items)


def _put_back(container: Any, items: Any) -> None:
    """Take out what holds proxies; what it stood in place of comes back."""
    if not _holds_proxy(container):
        return
    if isinstance(container, dict):
        added = [k for k, v in container.items() if _holds_proxy(k) or _holds_proxy(v)]
        for key in added:
            del container[key]
        container.update({key: items[key] for key in added if key in items})
    else:
        container.clear()
        getattr(container, "extend" if isinstance(container, list) else "update")(items)


def _restore(home: Any, names: dict[str, Any]) -> None:
    for name, value in list(_names(home).items()):
        if (name in names and names[name] is value) or not _holds_proxy(value):
            continue
        if isinstance(home, dict):
            del home[name]
            home.update({name: names[name]} if name in names else {})
        elif name in names:
            setattr(home, name, names[name])
        else:
            delattr(home, name)
