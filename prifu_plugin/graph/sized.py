"""Capture with example values at hand: what a forward decides on sizes is decided, and guarded.

torch.fx stops where Python asks a tensor for its sizes and branches, loops or rounds. Here every
proxy also carries its value in one example run. A decision on sizes follows the example, and a
guard in the graph refuses inputs for which it would come out differently. What is decided on the
values of tensors stays refused.
"""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import FunctionType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace
from torch.fx.node import map_aggregate
from torch.fx.proxy import TraceError
from torch.utils import _pytree as pytree

from prifu_plugin.errors import CaptureError
from prifu_plugin.graph.capture import (
    CONSTANT,
    Captured,
    ModelTracer,
    traced,
)
from prifu_plugin.graph.guards import GUARD
from prifu_plugin.graph.host import is_host
from prifu_plugin.graph.memory import keys_are_apart
from prifu_plugin.graph.padding import is_own_convolution, only_pads
from prifu_plugin.graph.patches import PATCHING
from prifu_plugin.graph.proxies import SizedProxy, plain, reads_tensors, value_of
from prifu_plugin.graph.texts import Texts
from prifu_plugin.graph.undisturbed import undisturbed
from prifu_plugin.names import LAYOUT_QUERIES, SIZE_QUERIES

_FILLED = ("empty", "zeros", "ones", "full")

_MAKERS = tuple(getattr(torch, name) for name in _FILLED)

_MADE = ("new_zeros", "new_ones", "new_full")

_PARTED = ("split", "chunk", "unbind")

_PLAIN = (bool, int, float, str, torch.Size, torch.dtype, torch.device, type(None))


def capture_sized(model: nn.Module, inputs: Sequence[Tensor]) -> Captured:
    """Trace a model in eval mode, looking inside every module that can be looked into.

    A module whose forward decides on values, or does what proxies cannot, stays one call.

    Args:
        model: any module; it is not changed.
        inputs: an example for each input.

    Returns:
        The graph; it has guards where the forward decides on sizes.

    Raises:
        CaptureError: if the outermost forward cannot be traced.

    Example:
        >>> class Halves(nn.Module):
        ...     def forward(self, x):
        ...         return x[:, : x.shape[1] // 2] if x.shape[1] % 2 == 0 else x
        >>> from prifu_plugin.graph.guards import is_guard
        >>> graph = capture_sized(Halves(), [torch.zeros(1, 4)]).graph
        >>> sum(is_guard(node) for node in graph.nodes)
        1
    """
    leaves: set[str] = set()
    told: set[int] = set()
    while True:
        tracer = SizedTracer([x.clone() for x in inputs], leaves, told)
        try:
            with PATCHING, undisturbed(model, keep=CONSTANT), _open():
                found = traced(model, tracer)
        except CaptureError:
            if tracer.texts.pending:  # what is looked up is another text
                told |= tracer.texts.pending.keys()
                continue
            if not tracer.entered or tracer.entered[-1] in leaves:
                raise
            leaves.add(tracer.entered[-1])
            told = set()
            continue
        for node in found.graph.nodes:
            if node.target in _MAKERS:  # code would register its name, which later traces look up
                node.meta.pop("is_wrapped", None)
        return replace(found, way="sizes")


@contextmanager
def _open() -> Iterator[None]:
    """Let sizes into torch.tensor and kin, and tracing into what libraries keep from torch.fx."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "tensor", _tensor))
        for name in ("finfo", "iinfo"):
            asked = getattr(torch, name)
            stack.enter_context(mock.patch.object(torch, name, _of_plain(asked)))
        stack.enter_context(mock.patch.object(builtins, "len", _length))
        for name in _FILLED:  # nodes, so that another batch size is no other decision
            recorded = _symbolic_trace._create_wrapped_func(getattr(torch, name))
            stack.enter_context(mock.patch.object(torch, name, recorded))
        stack.enter_context(mock.patch.dict(_symbolic_trace._wrapped_fns_to_patch, clear=True))
        yield


def looks_into(root: nn.Module, node: fx.Node) -> bool:
    """Whether a call in a plain graph is one that this tracer would look into."""
    if node.op == "call_module":
        path = str(node.target)
        return not SizedTracer([], set()).is_leaf_module(root.get_submodule(path), path)
    home = str(getattr(node.target, "__module__", ""))
    return isinstance(node.target, FunctionType) and not home.startswith(
        ("torch.", "prifu_plugin.")
    )


def computes_weight(module: nn.Module) -> bool:
    """Whether a layer is a convolution of a subclass whose forward may compute another weight."""
    if is_host(module) or type(module).__module__.startswith("torch."):
        return False
    return is_own_convolution(module) and not only_pads(module)


class SizedTracer(ModelTracer):
    """Trace with the values of an example run, through what timm keeps opaque too.

    Args:
        inputs: one example for each input.
        leaves: paths of modules that stay one call.
        told: numbers of the texts that decide, in the order in which the forward makes them.

    Attributes:
        entered: paths of the modules whose forward is running, the outermost first; after an
            error, those in which it was raised.
    """

    def __init__(
        self, inputs: Sequence[Tensor], leaves: set[str], told: Collection[int] = ()
    ) -> None:
        super().__init__(len(inputs), opaque=False)
        self.texts = Texts(told)
        self._given = iter(inputs)
        self._leaves = leaves
        self._guarded: set[tuple[fx.Node, Any]] = set()
        self._storage: dict[fx.Node, set[int]] = {}
        self._overwritten: set[fx.Node] = set()
        self._parts: dict[fx.Node, tuple[fx.Node, Any]] = {}
        self.entered: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the graph keeps this module as one call."""
        if module_qualified_name in self._leaves:
            return True
        if not super().is_leaf_module(m, module_qualified_name):
            return False
        before, self.computing = self.computing, True  # what tries a layer is not traced
        try:
            return not computes_weight(m)
        finally:
            self.computing = before

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Trace a call, or only make it while a value is computed."""
        if self.computing:
            return forward(*args, **kwargs)
        self.entered.append(self.path_of_module(m))
        result = super().call_module(m, forward, args, kwargs)
        self.entered.pop()
        return result

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Return the proxy of a parameter or stored tensor, or its value while one is computed."""
        if self.computing:
            return attr_val
        if not isinstance(attr_val, Tensor) or isinstance(attr_val, nn.Parameter):
            return super().getattr(attr, attr_val, parameter_proxy_cache)
        # A method of a bare tensor takes no proxies for sizes.
        node = self.create_arg(attr_val)
        assert isinstance(node, fx.Node)
        return self.proxy(node).carrying(attr_val)

    def proxy(self, node: fx.Node) -> SizedProxy:
        """Return a proxy that carries a value."""
        return SizedProxy(node, self)

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **named: Any
    ) -> Any:
        """Record an operation and carry it out."""
        if target in ("item", "tolist"):
            self.refuse(TraceError(f"'{target}' asks for the values of a tensor."))
        proxy: Any = super().create_proxy(kind, target, args, kwargs, *more, **named)
        if self._overwritten.intersection(proxy.node.all_input_nodes):
            what = f"'{proxy.node.name}' reads what was overwritten through a view."
            self.refuse(TraceError(what))
        values = map_aggregate((tuple(args), dict(kwargs)), value_of)
        asked = values[0][1] if target is getattr else target
        reads = asked not in SIZE_QUERIES | LAYOUT_QUERIES and reads_tensors((args, kwargs))
        of_values = kind != "get_attr" and reads
        if kind == "call_method" and target in _MADE:
            proxy.__dict__["sizes"] = (args[1:], kwargs)
        if getattr(target, "__name__", target) in _PARTED:
            proxy.__dict__["parted"] = (getattr(target, "__name__", target), args, kwargs)
        try:
            value = self._compute(kind, target, *values)
        except Exception as error:
            self.refuse(error)
        tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
        self._storage[proxy.node] = {t.untyped_storage().data_ptr() for t in tensors if t.numel()}
        self._inherit(proxy.node)
        return proxy.carrying(value, of_values)

    def is_part(self, node: fx.Node, whole: fx.Node, key: Any) -> None:
        """Note that a node is a part of another, and shares its memory."""
        self._parts[node] = whole, key
        known = self._storage.get(node, set()) | self._storage.get(whole, set())
        self._storage[node] = known

    def _inherit(self, node: fx.Node) -> None:
        """Note that what shares the memory of a part is of that part."""
        first = node.args[0] if node.args else None
        part = self._parts.get(first) if isinstance(first, fx.Node) else None
        if part is not None and self._storage[node] & self._storage.get(part[0], set()):
            self._parts[node] = part

    def overwrites(self, node: fx.Node, value: Tensor, key: Any) -> None:
        """Note that a part of a tensor was written to: it, and views of it, are not read again."""
        place = value.untyped_storage().data_ptr()
        views = {other for other, places in self._storage.items() if place in places} | {node}
        if any(view.op in ("get_attr", "placeholder") for view in views):
            self.refuse(TraceError(f"'{node.name}' is written to, which outlives the forward."))
        parts = ((view, *self._parts[view]) for view in views if view in self._parts)
        apart = {view for view, whole, k in parts if whole is node and keys_are_apart(k, key)}
        self._overwritten |= views - apart

    def decided(self, proxy: Any, how: Callable[[Any], Any]) -> Any:
        """Return what Python makes of a size, and guard it."""
        if not isinstance(proxy, SizedProxy):
            return how(proxy)
        value = proxy.value
        if proxy.of_values or not isinstance(value, _PLAIN):
            self.refuse(TraceError(f"'{proxy.node.name}' is no size: Python decides on values."))
        answer = how(value)
        if (proxy.node, value) not in self._guarded:
            self._guarded.add((proxy.node, value))
            same = self.create_proxy("call_function", operator.eq, (proxy, value), {})
            self.create_proxy("call_function", torch._assert, (same, GUARD), {})
        return answer

    def to_bool(self, obj: Any) -> bool:
        """Decide a branch."""
        return bool(self.decided(obj, bool))

    def _compute(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        if kind == "placeholder":
            return next(self._given)
        if target is torch._assert:
            return None
        self.computing = True
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                if kind == "get_attr":
                    return operator.attrgetter(target)(self.root)
                if kind == "call_module":
                    return self.root.get_submodule(target)(*args, **kwargs)
                if kind == "call_method":
                    return getattr(args[0], target)(*args[1:], **kwargs)
                return target(*args, **kwargs) if kind == "call_function" else None
        finally:
            self.computing = False


_len = len


def _length(value: Any) -> Any:
    """Return a size that stays one, where Python's own length would be decided now."""
    if isinstance(value, SizedProxy) and isinstance(value.__dict__.get("value"), Tensor):
        return value.size(0)
    return _len(value)


def _of_plain(function: Any) -> Any:
    return lambda *args: function(*map(plain, args))


_make_tensor = torch.tensor


def _tensor(data: Any, *args: Any, **kwargs: Any) -> Any:
    """Make a tensor of sizes: torch.tensor itself takes no proxies."""
    return _make_tensor(map_aggregate(data, plain), *args, **kwargs)
