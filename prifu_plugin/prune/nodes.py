"""What nodes of a graph are given: arguments, sizes, layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

SIZED = ("view", "reshape", "expand")
"""Methods whose arguments are the sizes of the result, one a dimension."""


def size_arguments(node: fx.Node) -> list[Any]:
    """Return the size arguments of view, reshape or expand, however they were passed."""
    rest = list(node.args[1:]) or [node.kwargs.get("shape") or node.kwargs.get("size")]
    if len(rest) == 1 and isinstance(rest[0], tuple | list):
        return list(rest[0])
    return rest


def layer_of(node: fx.Node) -> Any:
    """Return what a node calls: the path of its module, or of the weight of a functional."""
    weight = node.args[1] if node.op == "call_function" and len(node.args) > 1 else None
    return weight.target if isinstance(weight, fx.Node) else node.target


def first_input(node: fx.Node) -> fx.Node:
    """Return the first argument of a node, which its rule knows to be a node."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def mapped(value: Any, replace: Callable[[fx.Node], Any]) -> Any:
    """Return an argument of a node with its nodes replaced."""
    return fx.node.map_arg(value, replace)
