"""Filters behind functional normalizations: F.layer_norm and kin inside a module's forward.

There is no layer to carry the filter, so the module that makes the call does: its forward is
traced alone, its children whole, and the filter's call is put behind the normalization. A forward
that branches on its mode, on arguments that are no tensors or on plain attributes is traced once
for each combination it meets. The module keeps its class name, children and parameters.
"""

from __future__ import annotations

import dis
import inspect
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._compile import _disable_dynamo

from prifu_plugin.errors import CaptureError
from prifu_plugin.graph.norms import DIMS_WITH_STATISTICS, FUNCTIONAL_DIMS, base_class, beneath
from prifu_plugin.graph.own_forward import default_values, key_of, trace_alone
from prifu_plugin.graph.reads import Reads, still_so
from prifu_plugin.names import value_at


@dataclass(frozen=True)
class FunctionalCall:
    """A functional normalization in a forward.

    Attributes:
        name: of the node of the normalization, unique in the forward.
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


def functional_calls(module: nn.Module) -> list[FunctionalCall]:
    """List the functional normalizations in a module's own forward, in train and eval mode.

    Raises:
        CaptureError: if the forward cannot be traced by itself.
    """
    found: dict[str, FunctionalCall] = {}
    values = default_values(module)
    for training in (True, False):
        for node in _calls(trace_alone(module, training, values).graph):
            norm = _normalization(node) or node
            name = getattr(norm.target, "__name__", "norm")
            channels = _channels(module, norm)
            found[norm.name] = FunctionalCall(norm.name, name, _DIMS[norm.target], channels)
    return list(found.values())


def functional_owners(graph: fx.Graph) -> Iterator[str]:
    """Yield the paths of the modules whose forwards make the functional normalizations."""
    for node in _calls(graph):
        stack = node.meta.get("nn_module_stack") or {"": ("", None)}
        yield str(list(stack.values())[-1][0])


def names_functional(forward: Any) -> bool:
    """Whether the code of a forward names a functional normalization; self.layer_norm is none."""
    code = getattr(forward, "__code__", None)
    names = {getattr(function, "__name__", function) for function in _DIMS}
    if code is None or not names & set(code.co_names):
        return False
    own = code.co_varnames[:1]
    steps = list(dis.get_instructions(code))
    return any(
        step.argval in names
        and not (before.opname.startswith("LOAD_FAST") and before.argval in own)
        for before, step in zip(steps, steps[1:], strict=False)
        if isinstance(step.argval, str)
    )


def host_calls(module: nn.Module, filters: FilterGroup, child: str) -> None:
    """Make a module's forward pass through filters, in place."""
    module.add_module(child, filters)
    _rehost(module, child)


def _rehost(module: nn.Module, child: str) -> None:
    base = base_class(module)
    module.__class__ = base
    forwards = Forwards()
    for training in (True, False):
        _add_forward(forwards, module, child, training, default_values(module), first=True)
    forward, reduction = _choosing(base, child, forwards), _reduction(base, child)
    module.__class__ = beneath(module, lambda cls: _hosting_class(cls, forward, reduction))


def _hosting_class(base: type[nn.Module], forward: Any, reduction: Any) -> type[nn.Module]:
    members = {
        "forward": forward,
        "__reduce_ex__": reduction,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_prifu_base": base,
        "_prifu_kind": "functional",
    }
    return type(base.__name__, (base,), members)


_KEPT = 8
"""Forwards that are kept for other values of attributes: one that is annealed has many."""


@dataclass
class Forwards:
    """The compiled forwards of a host.

    Attributes:
        by_key: mode and arguments -> compiled forwards, with the attributes each is right for.
        known: mode -> the normalizations that wrap saw, with a filter or without.
    """

    by_key: dict[tuple[Any, ...], list[tuple[Reads, Any]]] = field(default_factory=dict)
    known: dict[bool, list[str]] = field(default_factory=dict)


def _add_forward(
    forwards: Forwards,
    module: nn.Module,
    child: str,
    training: bool,
    values: dict[str, Any],
    *,
    first: bool = False,
) -> Any:
    """Compile a forward that passes through the filters, for one combination of arguments."""
    filters = module._modules[child]
    assert isinstance(filters, FilterGroup)
    traced = trace_alone(module, training, values)
    graph = traced.graph
    calls = [(node, (_normalization(node) or node).name) for node in _calls(graph)]
    names = list(dict.fromkeys(name for _, name in calls))
    if forwards.known.setdefault(training, names if first else []) != names:
        raise CaptureError(
            f"{base_class(module).__name__} makes other normalizations with these arguments or "
            f"attributes ({', '.join(names) or 'none'}) than when it was wrapped "
            f"({', '.join(forwards.known[training]) or 'none'}): which filter belongs to which is "
            "not clear. Wrap it as it is to be used, or leave it out with exclude=."
        )
    for node, name in calls:
        if name in filters:
            with graph.inserting_after(node):
                call = graph.call_module(f"{child}.{name}", (node,))
            for user in [user for user in node.users if user is not call]:
                user.replace_input_with(node, call)
    compiled = _compiled(graph)
    key = key_of(training, values, traced.numbers)
    forwards.by_key[key] = [(traced.reads, compiled), *forwards.by_key.get(key, ())][:_KEPT]
    return compiled


def _forward_for(forwards: Forwards, module: nn.Module, values: dict[str, Any]) -> Any:
    """Return the compiled forward for these arguments and today's attributes, if there is one."""
    for numbers in (False, True):
        for reads, compiled in forwards.by_key.get(key_of(module.training, values, numbers), ()):
            if still_so(module, reads):
                return compiled
    return None


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


def _calls(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield normalizations of what comes in; one of parameters alone is weight standardization."""
    from_input: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(n in from_input for n in node.all_input_nodes):
            from_input.add(node)
        norm = _normalization(node)
        if norm is not None:
            source = norm.args[0] if norm.args else norm.kwargs.get("input")
            if source in from_input:
                yield node


_DIMS = {**FUNCTIONAL_DIMS, **DIMS_WITH_STATISTICS}


def _normalization(node: fx.Node) -> fx.Node | None:
    """Return the normalization that a node is, or the one whose result it takes from a tuple."""
    if node.op == "call_function" and node.target in FUNCTIONAL_DIMS:
        return node
    if node.target is not operator.getitem or node.args[1] != 0:
        return None
    made = node.args[0]
    known = isinstance(made, fx.Node) and made.target in DIMS_WITH_STATISTICS
    return cast(fx.Node, made) if known else None


def _channels(module: nn.Module, node: fx.Node) -> int | None:
    for value in [*node.args[1:], *node.kwargs.values()]:
        if isinstance(value, tuple | list) and value and isinstance(value[-1], int):
            return value[-1]
        if isinstance(value, fx.Node) and value.op == "get_attr":
            tensor = value_at(module, str(value.target))
        elif isinstance(value, fx.Node) and value.op == "call_module" and not value.args:
            tensor = module.get_submodule(str(value.target))()  # of a parametrization
        else:
            continue
        if isinstance(tensor, Tensor) and tensor.ndim == 1:
            return tensor.numel()
    return None


def _compiled(graph: fx.Graph) -> Any:
    code = graph.python_code("self")
    scope: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, "<filtered forward>", "exec"), scope)
    return scope["forward"]


def _choosing(base: type[nn.Module], child: str, forwards: Forwards) -> Any:
    """Write a forward with the original's signature that picks the graph for its arguments."""
    original: Any = base.forward
    signature = inspect.signature(original)
    parameters = list(signature.parameters.values())
    listed, defaults = [], {}
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in listed:
            listed.append("*")
        if parameter.default is parameter.empty:
            listed.append(parameter.name)
        else:
            defaults[parameter.name] = parameter.default
            listed.append(f"{parameter.name}=defaults[{parameter.name!r}]")
    own, *names = [parameter.name for parameter in parameters]
    values = ", ".join(f"{name!r}: {name}" for name in names)
    source = f"def forward({', '.join(listed)}):\n    return call({own}, {{{values}}})\n"

    def call(module: nn.Module, values: dict[str, Any]) -> Any:
        found = _forward_for(forwards, module, values)
        if found is None:
            add = _add_outside if torch.compiler.is_compiling() else _add_forward_again
            found = add(forwards, module, child, values)
        return found(module, *values.values())

    scope: dict[str, Any] = {"call": call, "defaults": defaults}
    exec(compile(source, "<filtered forward>", "exec"), scope)
    return scope["forward"]


def _add_forward_again(
    forwards: Forwards, module: nn.Module, child: str, values: dict[str, Any]
) -> Any:
    cls = module.__class__
    module.__class__ = base_class(module)
    try:
        return _add_forward(forwards, module, child, module.training, values)
    finally:
        module.__class__ = cls


_add_outside = _disable_dynamo(_add_forward_again)
"""The same where a compiler is tracing, which cannot trace a trace: the graph breaks there."""
