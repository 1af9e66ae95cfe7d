"""Filters behind functional normalizations: F.layer_norm and kin inside a module's forward.

There is no layer to carry the filter, so the module that makes the call does: its forward is
traced alone, its children whole, once in train and once in eval mode, and the filter's call is put
behind the normalization. The module keeps its class name, children and parameters.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from prifu_plugin.errors import CaptureError
from prifu_plugin.graph.norms import FUNCTIONAL_DIMS, base_class


@dataclass(frozen=True)
class FunctionalCall:
    """A functional normalization in a forward.

    Attributes:
        name: of its node, unique in the forward.
        function: its name.
        dim: channel dimension.
        channels: number of channels, None if the arguments do not tell.
    """

    name: str
    function: str
    dim: int
    channels: int | None


class FilterGroup(nn.ModuleDict):
    """The filters of one forward, by the name of the normalization they follow."""


class _OwnTracer(fx.Tracer):
    """Trace one forward; every child is a call."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def functional_calls(module: nn.Module) -> list[FunctionalCall]:
    """List the functional normalizations in a module's own forward, in train and eval mode.

    Raises:
        CaptureError: if the forward cannot be traced by itself.
    """
    found: dict[str, FunctionalCall] = {}
    for graph in _graphs(module).values():
        for node in _calls(graph):
            name = getattr(node.target, "__name__", "norm")
            channels = _channels(module, node)
            found[node.name] = FunctionalCall(
                node.name, name, FUNCTIONAL_DIMS[node.target], channels
            )
    return list(found.values())


def functional_owners(graph: fx.Graph) -> Iterator[str]:
    """Yield the paths of the modules whose forwards make the functional normalizations."""
    for node in _calls(graph):
        stack = node.meta.get("nn_module_stack") or {"": ("", None)}
        yield str(list(stack.values())[-1][0])


def host_calls(module: nn.Module, filters: FilterGroup, child: str) -> None:
    """Make a module's forward pass through filters, in place."""
    module.add_module(child, filters)
    _rehost(module, child)


def _rehost(module: nn.Module, child: str) -> None:
    base = base_class(module)
    filters = module._modules[child]
    assert isinstance(filters, FilterGroup)
    module.__class__ = base
    forwards = {}
    for training, graph in _graphs(module).items():
        for node in list(_calls(graph)):
            if node.name in filters:
                with graph.inserting_after(node):
                    call = graph.call_module(f"{child}.{node.name}", (node,))
                for user in [user for user in node.users if user is not call]:
                    user.replace_input_with(node, call)
        forwards[training] = _compiled(graph)
    members = {
        "forward": _switching(base, forwards),
        "__reduce_ex__": _reduction(base, child),
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_prifu_base": base,
        "_prifu_kind": "functional",
    }
    module.__class__ = type(base.__name__, (base,), members)


def _reduction(base: type[nn.Module], child: str) -> Any:
    def reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        return _blank, (base, child), self.__dict__

    return reduce


def _blank(base: type[nn.Module], child: str) -> nn.Module:
    """Make an instance that hosts its filters again once its state is set."""

    def set_state(self: nn.Module, state: dict[str, Any]) -> None:
        base.__setstate__(self, state)
        _rehost(self, child)

    members = {"__setstate__": set_state, "_prifu_base": base}
    cls: type[nn.Module] = type(base.__name__, (base,), members)
    module = cls.__new__(cls)
    assert isinstance(module, nn.Module)
    return module


def _graphs(module: nn.Module) -> dict[bool, fx.Graph]:
    modes = [(m, m.training) for m in module.modules()]
    before = set(module.__dict__)
    graphs = {}
    try:
        for training in (True, False):
            module.train(training)
            graphs[training] = _OwnTracer().trace(module)
        if set(module.__dict__) - before:
            raise ValueError("it makes tensors of its own")
    except Exception as error:
        raise CaptureError(
            f"the forward of {type(module).__name__} cannot be traced by itself: {error}"
        ) from error
    finally:
        for part, training in modes:
            part.training = training
        for name in set(module.__dict__) - before:
            del module.__dict__[name]
    return graphs


def _calls(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield normalizations of what comes in; one of parameters alone is weight standardization."""
    from_input: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(n in from_input for n in node.all_input_nodes):
            from_input.add(node)
        if node.op == "call_function" and node.target in FUNCTIONAL_DIMS:
            source = node.args[0] if node.args else node.kwargs.get("input")
            if source in from_input:
                yield node


def _channels(module: nn.Module, node: fx.Node) -> int | None:
    for value in [*node.args[1:], *node.kwargs.values()]:
        if isinstance(value, tuple | list) and value and isinstance(value[-1], int):
            return value[-1]
        if isinstance(value, fx.Node) and value.op == "get_attr":
            tensor: Any = module
            for part in str(value.target).split("."):
                tensor = getattr(tensor, part)
            if isinstance(tensor, Tensor) and tensor.ndim == 1:
                return tensor.numel()
    return None


def _compiled(graph: fx.Graph) -> Any:
    code = graph.python_code("self")
    scope: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, "<filtered forward>", "exec"), scope)
    return scope["forward"]


def _switching(base: type[nn.Module], forwards: dict[bool, Any]) -> Any:
    """Write a forward with the original's parameters that picks the graph of the mode it is in."""
    original: Any = base.forward
    names = list(inspect.signature(original).parameters)[1:]
    listed = ", ".join(names)
    source = (
        f"def forward(self, {listed}):\n"
        f"    if self.training:\n        return in_train(self, {listed})\n"
        f"    return in_eval(self, {listed})\n"
    )
    scope: dict[str, Any] = {"in_train": forwards[True], "in_eval": forwards[False]}
    exec(compile(source, "<filtered forward>", "exec"), scope)
    scope["forward"].__defaults__ = original.__defaults__
    return scope["forward"]
