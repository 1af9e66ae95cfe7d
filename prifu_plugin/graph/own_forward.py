"""One forward traced by itself, its children whole, for one combination of arguments."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import fx, nn

from prifu_plugin.errors import CaptureError
from prifu_plugin.graph.norms import base_class
from prifu_plugin.graph.patches import PATCHING
from prifu_plugin.graph.questions import WatchfulTracer, answering_types
from prifu_plugin.graph.reads import Reads, check_unchanged, held, noting_reads
from prifu_plugin.graph.side_effects import only_operations
from prifu_plugin.graph.undisturbed import undisturbed


@dataclass(frozen=True)
class Traced:
    """A forward, with what was decided while it was traced.

    Attributes:
        graph: of it.
        reads: the plain attributes it was traced with.
        numbers: whether arguments that are numbers were decided too.
    """

    graph: fx.Graph
    reads: Reads
    numbers: bool


def trace_alone(module: nn.Module, training: bool, values: dict[str, Any]) -> Traced:
    """Trace a forward with what is None, a flag or a word decided; numbers too if need be.

    Args:
        module: whose forward it is; it is not changed.
        training: in which mode.
        values: of its arguments, `default_values` or those of a call.

    Raises:
        CaptureError: if it does what a graph would lose.
    """
    decided = {name: v for name, v in values.items() if isinstance(v, _DECIDED)}
    numbers = {name: v for name, v in values.items() if isinstance(v, int | float)}
    try:
        return Traced(*_trace_with(module, training, decided), numbers=False)
    except CaptureError:
        if not numbers.keys() - decided.keys():
            raise
        return Traced(*_trace_with(module, training, {**decided, **numbers}), numbers=True)


def _trace_with(
    module: nn.Module, training: bool, decided: dict[str, Any]
) -> tuple[fx.Graph, Reads]:
    try:
        with PATCHING, undisturbed(module), only_operations(in_training=True):
            module.train(training)
            before = held(module)
            with noting_reads(module) as reads, answering_types():
                graph = _OwnTracer().trace(module, concrete_args=decided or None)
            check_unchanged(module, before)
    except Exception as error:
        raise CaptureError(
            f"the forward of {type(module).__name__} cannot be traced by itself: {error}"
        ) from error
    # The argument stays, for the caller's sake; what it is was decided.
    names = set(_parameters(module))
    for node in [n for n in graph.nodes if n.op == "placeholder" and n.target not in names]:
        for user in list(node.users):
            for last in list(user.users):
                graph.erase_node(last)
            graph.erase_node(user)
    return graph, reads


_DECIDED = (type(None), bool, str)


def _parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    # Of the class, since self.forward of a host is the one that chooses.
    forward: Any = base_class(module).forward
    found = dict(list(inspect.signature(forward).parameters.items())[1:])
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in found.values()):
        raise CaptureError(f"the forward of {type(module).__name__} takes *args or **kwargs")
    return found


def default_values(module: nn.Module) -> dict[str, Any]:
    """Return the default of each argument; those without one are tensors."""
    return {
        name: _ANY if parameter.default is parameter.empty else parameter.default
        for name, parameter in _parameters(module).items()
    }


_ANY = object()
"""Stands for an argument that stays one: a tensor, a number."""


def key_of(training: bool, values: dict[str, Any], numbers: bool = False) -> tuple[Any, ...]:
    """Return what a trace depends on: the mode, and arguments that are decided while it is made."""
    kinds = (*_DECIDED, int, float) if numbers else _DECIDED
    return training, numbers, *(v if isinstance(v, kinds) else _ANY for v in values.values())


class _OwnTracer(WatchfulTracer):
    """Trace one forward; every child is a call."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        return super().create_arg(a.item() if isinstance(a, np.generic) else a)
