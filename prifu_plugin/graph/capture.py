"""Capture a model's graph with torch.fx, without breaking its normalization layers."""

from __future__ import annotations

import inspect
import keyword
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, is_dataclass
from typing import Any, cast
from unittest import mock

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.nn.modules import transformer
from torch.nn.utils import parametrize
from torch.utils import checkpoint
from torch.utils.checkpoint import CheckpointFunction

from prifu_plugin.cut import CutFilter
from prifu_plugin.errors import CaptureError, ConfigError
from prifu_plugin.filter import PriFU
from prifu_plugin.graph.host import is_host
from prifu_plugin.graph.norms import is_norm
from prifu_plugin.graph.patches import PATCHING, patched
from prifu_plugin.graph.questions import WatchfulTracer, answering_types
from prifu_plugin.graph.side_effects import only_operations
from prifu_plugin.graph.undisturbed import undisturbed


@dataclass(frozen=True)
class Captured:
    """A graph and the module its targets refer to.

    Attributes:
        root: the module.
        graph: on it.
        computed: parameter or constant -> its value in fp64, for those that a forward computed.
        way: "graph" where torch.fx alone followed the forward, "sizes" where an example decided.
        notes: (path, what the graph does otherwise than the forward in training).
    """

    root: nn.Module
    graph: fx.Graph
    computed: dict[str, Tensor] = field(default_factory=dict)
    way: str = "graph"
    notes: list[tuple[str, str]] = field(default_factory=list)


class ModelTracer(WatchfulTracer):
    """Trace through containers, stop at layers.

    Leaves are the modules of torch.nn, what timm registers as opaque, normalization layers
    (traced through, a BatchNorm would lose its count of batches) and filters.

    Args:
        given: how many positional inputs the model is given; None for those without a default.
        opaque: whether to stop at what timm registers.
        buffers: whether what is computed from buffers of floats stays in the graph, where any
            precision can compute it, rather than be computed now.

    Attributes:
        computing: whether an operation is carried out now, rather than recorded.
    """

    def __init__(
        self, given: int | None = None, *, opaque: bool = True, buffers: bool = False
    ) -> None:
        self.computing = False
        self._inputs = given
        self._buffers = buffers
        modules, functions = _timm_leaves() if opaque else ([], [])
        self._opaque = tuple(modules)
        super().__init__(autowrap_functions=tuple(functions))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the graph keeps this module as one call."""
        if isinstance(m, PriFU | CutFilter | torch.jit.ScriptModule) or is_norm(m):
            return True
        if is_host(m):
            return False
        if isinstance(m, (*self._opaque, *_LAYERS, *_REGISTERED)):
            return True
        if any(is_norm(child) for child in m.modules()):
            return False  # nn.TransformerEncoderLayer and kin: torch's own, with norms inside
        if parametrize.is_parametrized(m):  # torch derives a class of its own
            before = parametrize.type_before_parametrizations(m)
            return bool(before.__module__.startswith("torch.nn"))
        return super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Return the outermost forward and what to call it with: the inputs that are given.

        All others keep their defaults, so that "x is None" is decided now.
        """
        names = _input_names(root_fn, self._inputs)
        inputs = [self.create_proxy("placeholder", name, (), {}) for name in names]
        return lambda *args: root_fn(*args), [self.root, *inputs]

    def create_arg(self, a: Any) -> Any:
        """Record an argument; a dictionary with a class of its own is made by that class."""
        if isinstance(a, fx.Proxy):  # before it says that it is a tensor
            return a.node
        a = a.item() if isinstance(a, np.generic) else a
        if isinstance(a, dict) and (isinstance(a, OrderedDict) or is_dataclass(a)):
            items = {key: self.create_arg(value) for key, value in a.items()}
            if all(_is_name(key) for key in a):
                return self.create_node("call_function", type(a), (), items)
            if all(isinstance(key, str | int) for key in a):  # what no argument can be called
                return self.create_node("call_function", type(a), (list(items.items()),), {})
        return super().create_arg(a)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Return the value of an attribute, or its proxy."""
        stored = isinstance(attr_val, Tensor) and not isinstance(attr_val, nn.Parameter)
        if not self._buffers or not stored or not attr_val.is_floating_point():
            return super().getattr(attr, attr_val, parameter_proxy_cache)
        return self.proxy(cast(fx.Node, self.create_arg(attr_val)))


def _is_name(key: Any) -> bool:
    return isinstance(key, str) and key.isidentifier() and not keyword.iskeyword(key)


_REGISTERED: list[type[nn.Module]] = []


def register_leaf(cls: type[nn.Module]) -> type[nn.Module]:
    """Let every capture keep modules of a class as one call; usable as a decorator.

    For a module whose forward is better not followed: one that calls a kernel of its own, or that
    has a rule of its own (`register_pointwise`). Prune gives it all channels of its inputs.

    Args:
        cls: a module class; its subclasses are kept too.

    Returns:
        The class.

    Raises:
        ConfigError: if it is no module class.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ConfigError(f"{cls!r} is no module class: register the class, not an instance.")
    if cls not in _REGISTERED:
        _REGISTERED.append(cls)
    return cls


def capture(model: nn.Module, given: int | None = None) -> Captured:
    """Trace a model in the mode it is in (train or eval).

    Arguments of forward that have defaults keep them, so that "x is None" is decided now; the
    graph does not take them any more.

    Args:
        model: any module; it is not changed, but for tensors its forward makes: the graph reads
            them from attributes named _tensor_constant0 and so on.
        given: how many positional inputs are given, defaults or not.

    Returns:
        The graph, with targets that are paths in `model`.

    Raises:
        CaptureError: if its Python code decides on values of tensors.

    Example:
        >>> [n.name for n in capture(nn.Sequential(nn.Linear(2, 2))).graph.nodes]
        ['input_1', '_0', 'output']
    """
    with undisturbed(model, keep=CONSTANT):
        found = traced(model, ModelTracer(given))
        if not _has_computed(found):
            return found
        try:
            return traced(model, ModelTracer(given, buffers=True))
        except CaptureError:  # its forward decides on the values of buffers
            return found


def _has_computed(captured: Captured) -> bool:
    """Whether a graph holds floats that the forward made while it was traced."""
    found = [
        getattr(captured.root, str(node.target), None)
        for node in captured.graph.nodes
        if node.op == "get_attr" and str(node.target).startswith(CONSTANT)
    ]
    return any(isinstance(value, Tensor) and value.is_floating_point() for value in found)


def traced(model: nn.Module, tracer: ModelTracer) -> Captured:
    """Trace with a tracer; see `capture`."""
    try:
        with (
            PATCHING,
            _traceable_torch(),
            answering_types(),
            only_operations(lambda: tracer.computing),
        ):
            return Captured(model, tracer.trace(model))
    except CaptureError as error:
        raise CaptureError(f"{type(model).__name__} cannot be traced: {error}") from error
    except Exception as error:
        why = str(error).rstrip(".") or type(error).__name__
        if not isinstance(error, TraceError):
            why = f"its forward raises {type(error).__name__}: {why}"
        raise CaptureError(
            f"{type(model).__name__} cannot be traced: {why}. Its forward branches on the value "
            "of a tensor, or uses an operation torch.fx does not know."
        ) from error


def calls(captured: Captured) -> set[str]:
    """Return the paths of the modules that a graph calls."""
    return {str(node.target) for node in captured.graph.nodes if node.op == "call_module"}


CONSTANT = "_tensor_constant"
"""Prefix of the attributes in which torch.fx leaves tensors that a forward makes."""


def _input_names(forward: Callable[..., Any], given: int | None) -> list[str]:
    """Return names for the positional inputs of a forward, the surplus ones from its *args."""
    _, *parameters = inspect.signature(forward).parameters.values()
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if given is None:
        return [p.name for p in by_position if p.default is p.empty]
    names = [p.name for p in by_position][:given]
    surplus = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
    if surplus is None:
        return names
    return names + [f"{surplus}_{at}" for at in range(given - len(names))]


# Subclasses elsewhere than in torch.nn are layers too (weight standardization, same padding).
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def _timm_leaves() -> tuple[list[type[nn.Module]], list[Callable[..., Any]]]:
    """Return timm's registry of opaque modules and functions, if timm is in use."""
    layers = sys.modules.get("timm.layers")
    if layers is None:
        return [], []
    return list(layers.get_notrace_modules()), list(layers.get_notrace_functions())


_APPLY = torch.autograd.Function.__dict__["apply"]


def _apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuse to trace through a function that has a gradient of its own, which would be lost."""
    if cls is CheckpointFunction:
        return args[0](*args[2:])
    if any(isinstance(arg, fx.Proxy) for arg in (*args, *kwargs.values())):
        raise CaptureError(f"{cls.__name__} is an autograd.Function, with a gradient of its own")
    return _APPLY.__get__(None, cls)(*args, **kwargs)


_EXPAND = Tensor.expand


def _expand(self: Tensor, *sizes: Any, **named: Any) -> Any:
    """Record how a tensor that the forward makes is expanded: expand itself takes no proxies."""
    followed = next((size for size in sizes if isinstance(size, fx.Proxy)), None)
    if followed is None:
        return _EXPAND(self, *sizes, **named)
    return followed.tracer.create_proxy("call_method", "expand", (self, *sizes), named)


_CHECKPOINTS = [f"_checkpoint_without_reentrant_generator{end}" for end in ("", "_impl")]


def _once(*_: Any, **__: Any) -> Iterator[None]:
    """Stand around a checkpointed call and do nothing."""
    yield


@contextmanager
def _traceable_torch() -> Iterator[None]:
    """Switch off what torch's transformer layers decide on values, for the length of a trace.

    Their fast path reads the parameters of norms directly; the length of a sequence serves only
    to compare a mask with the causal one. An autograd.Function is not traced through, but for
    gradient checkpointing, which changes no value.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with ExitStack() as stack:
            stack.enter_context(patched(transformer, "_get_seq_len", lambda *_: None))
            stack.enter_context(patched(Tensor, "expand", _expand))
            for name in _CHECKPOINTS:
                stack.enter_context(patched(checkpoint, name, _once))
            apply = classmethod(_apply)
            stack.enter_context(mock.patch.object(torch.autograd.Function, "apply", apply))
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
