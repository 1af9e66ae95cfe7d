"""What Python asks of the proxies of torch.fx beside operations: types, texts and hashes.

A proxy answers none of them as the value would that it stands for; what is decided on the answers
would be lost from the graph without a word.
"""

from __future__ import annotations

import builtins
import operator
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, cast
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute, TraceError

from prifu_plugin.graph.augmented import Augmented
from prifu_plugin.graph.leftovers import no_leftovers
from prifu_plugin.graph.proxies import SizedProxy
from prifu_plugin.graph.texts import Texts
from prifu_plugin.names import LAYOUT_QUERIES, SIZE_QUERIES


class WatchfulTracer(fx.Tracer):
    """Traces what Python decides on only where it is recorded, or refused.

    Attributes:
        texts: that the forward has made of proxies.
        refused: errors by which the forward was told that it cannot be followed.
        finished: whether the forward has ended.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.texts = Texts()
        self.refused: list[Exception] = []
        self.finished = False

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace; texts that may have decided, and refusals that were caught, are errors."""
        try:
            with self.texts.heard(), no_leftovers(root):
                graph = super().trace(root, concrete_args)
        finally:
            self.finished = True
        if self.refused:  # an except, or contextlib.suppress, has taken it for one of the model's
            raise TraceError(f"its forward catches an error and goes on: {self.refused[0]}")
        if self.texts.pending:
            names = ", ".join(f"'{name}'" for name in self.texts.pending.values())
            raise TraceError(f"Python makes a text of {names}, which may decide.")
        return graph

    def refuse(self, error: Exception) -> NoReturn:
        """Raise an error, which ends the trace even if the forward catches it."""
        self.refused.append(error)
        raise error

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Refuse to branch on what has no value."""
        self.refuse(TraceError(f"Python branches on '{_name(obj)}', which has no value yet"))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Refuse to iterate over what has no length."""
        self.refuse(TraceError(f"Python iterates over '{_name(obj)}', of unknown length"))

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return a proxy that makes no answers up."""
        return PlainProxy(node, self)

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **named: Any
    ) -> Any:
        """Record an operation; what an assertion says decides nothing."""
        if getattr(target, "__name__", "") == "_assert":
            args = tuple(map(self.texts.taken, args))
            kwargs = {name: self.texts.taken(value) for name, value in kwargs.items()}
        return super().create_proxy(kind, target, args, kwargs, *more, **named)


class PlainProxy(Augmented, fx.Proxy):
    """A node without a value: texts of it are noted, and no number has a hash.

    Devices are no keys that anything was kept under: what is kept there is made anew.
    """

    tracer: Any

    def __getattr__(self, k: str) -> Attribute:
        if not hasattr(_SOME, k):
            shown = _shown(self)
            if shown is not None and not hasattr(shown, k):
                raise AttributeError(f"'{type(shown).__name__}' object has no attribute '{k}'")
        return _PlainAttribute(self, k)

    def is_tensor(self) -> bool:
        """Whether it certainly stands for a tensor."""
        shown = _shown(self)
        if shown is None and "attr" not in self.__dict__:
            return _gives_tensor(self.node)
        return _isinstance(shown, Tensor)

    def __len__(self) -> int:
        self._asked_for("its length")

    def __int__(self) -> int:
        self._asked_for("a whole number")

    def __float__(self) -> float:
        self._asked_for("a number")

    def __index__(self) -> int:
        self._asked_for("an index")

    def _asked_for(self, what: str) -> NoReturn:
        tracer: WatchfulTracer = self.tracer
        tracer.refuse(TraceError(f"Python asks '{_name(self)}' for {what}."))

    def __repr__(self) -> str:
        if isinstance(_shown(self), torch.device):
            return super().__repr__()
        return str(self.tracer.texts.write(_name(self), self._unknown))

    def __format__(self, form: str) -> str:
        return repr(self)

    def __hash__(self) -> int:
        if not isinstance(_shown(self), Tensor | torch.device):
            self.tracer.refuse(TraceError(f"'{_name(self)}' is looked up."))
        return object.__hash__(self)

    def _unknown(self) -> str:
        raise TraceError(f"the text of '{_name(self)}' is asked for.")


class _PlainAttribute(PlainProxy, Attribute):
    """What is asked of a proxy: a method if it is called, a node if it is used."""


def _name(proxy: fx.Proxy) -> str:
    """Return the name of a proxy; that of an attribute makes no node."""
    if _isinstance(proxy, Attribute):
        return f"{_name(proxy.root)}_{proxy.attr}"
    return proxy.node.name


@contextmanager
def answering_types() -> Iterator[None]:
    """Let isinstance say of proxies what their values are, in a with block.

    A proxy cannot say so by its __class__: torch's C code would take it for a tensor. torch's own
    Python is not told of sizes: it hands what it takes for a number or a tuple to such code.
    """

    def answer(value: Any, classes: Any) -> bool:
        if not _isinstance(value, fx.Proxy):
            return _isinstance(value, classes)
        shown = _shown(value)
        if _isinstance(shown, Tensor):
            return _isinstance(shown, classes) or issubclass(type(value), classes)
        if shown is None or classes is fx.Proxy or _asked_by_libraries():
            return _isinstance(value, classes)
        return _isinstance(shown, classes)

    with mock.patch.object(builtins, "isinstance", answer):
        yield


_isinstance = isinstance
_SOME = torch.empty(0)
_SHAPE = torch.Size()
_LAYERS = (
    *(nn.Linear, nn.LayerNorm, nn.GroupNorm),
    *(nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase),
)
_COMPARISONS = (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)
_NUMBERS = {"dim": 1, "numel": 1, "nelement": 1, "ndimension": 1}


def _asked_by_libraries() -> bool:
    """Whether isinstance was called from torch or from here, two frames above."""
    home = str(sys._getframe(2).f_globals.get("__name__", ""))
    return f"{home}.".startswith(("torch.", "prifu_plugin."))


def _shown(proxy: fx.Proxy) -> Any:
    """Return a value of the type that a proxy stands for, None where nothing tells it."""
    if "attr" in proxy.__dict__:
        return _asked(proxy.__dict__["attr"])
    if _isinstance(proxy, SizedProxy):
        return proxy.value
    return _made(proxy.node, proxy.tracer)


def _made(node: fx.Node, tracer: Any) -> Any:
    """Return a value of the type that a node certainly has: a tensor, a shape or a number."""
    if node.op == "placeholder":
        return None if node.args else _SOME  # a default may be a number
    if node.op == "call_module":
        layer = tracer.root.get_submodule(str(node.target))
        return _SOME if _isinstance(layer, _LAYERS) else None
    if node.op == "call_method" and node.target == "size":
        return 1 if len(node.args) + len(node.kwargs) > 1 else _SHAPE
    if node.op == "call_method":
        return _NUMBERS.get(str(node.target))
    if node.target is getattr:
        return _asked(str(node.args[1]))
    if getattr(node.target, "__module__", "") != "_operator":
        return None
    return _computed(node, tracer)


def _gives_tensor(node: fx.Node) -> bool:
    """Whether a node of which nothing else is known gives a tensor, or several, if anything."""
    name = str(getattr(node.target, "__name__", node.target))
    if node.op in ("call_module", "get_attr"):
        return True
    if node.op == "call_method" or str(getattr(node.target, "__module__", "")).startswith("torch"):
        return name not in SIZE_QUERIES | LAYOUT_QUERIES | {"item", "tolist"}
    operators = getattr(node.target, "__module__", "") == "_operator"
    return operators and any(_gives_tensor(operand) for operand in node.all_input_nodes)


def _asked(attribute: str) -> Any:
    return {"shape": _SHAPE, "ndim": 1, "device": _SOME.device}.get(attribute)


def _computed(node: fx.Node, tracer: Any) -> Any:
    """Return a value of the type that an operator makes, if its operands tell."""
    numbers: list[Any] = []
    for operand in node.args:
        shown: Any = operand
        if _isinstance(operand, fx.Node):
            shown = _made(cast(fx.Node, operand), tracer)
        if _isinstance(shown, Tensor):
            return _SOME
        if _isinstance(shown, torch.Size) and node.target is operator.getitem:
            return _SHAPE if _isinstance(node.args[1], slice) else 1
        if not _isinstance(shown, int | float):
            return None
        numbers.append(shown)
    if node.target in _COMPARISONS:
        return True
    fractions = node.target is operator.truediv or any(_isinstance(n, float) for n in numbers)
    return 1.0 if fractions else 1
