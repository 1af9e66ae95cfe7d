"""Operations in terms of others, so that each needs one rule only."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from prifu_plugin.prune.seen import seen, was_seen

_EXTREMES = {
    **dict.fromkeys((torch.max, "max"), (torch.maximum, torch.amax)),
    **dict.fromkeys((torch.min, "min"), (torch.minimum, torch.amin)),
}
"""What is called -> what it is of two tensors, and along a dimension."""

_BY_EXAMPLE = {"reshape_as": "reshape", "view_as": "view", "expand_as": "expand"}


_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)

_SCATTERS = (torch.slice_scatter, torch.select_scatter)


def spell_out(graph: fx.Graph, node: fx.Node) -> None:
    """Replace a stack by a concatenation; ask a tensor whose sizes are taken for its shape only.

    So is a tensor of which a slice is replaced, and a part that is there twice has two names.

    A bias that is computed is added behind the linear map, which then has none. A view becomes a
    reshape, since slices may leave its operand in other memory; the larger of two tensors is said
    by one name.
    """
    if node.target is torch.stack:
        _spell_out_stack(graph, node)
    elif node.target in _CONCATENATIONS:
        _spell_out_repeats(graph, node)
    elif node.target in _SCATTERS:
        _spell_out_scatter(graph, node)
    elif node.target is F.linear:
        _spell_out_linear(graph, node)
    elif node.target is F.glu:
        given = {**dict(zip(("input", "dim"), node.args, strict=False)), **node.kwargs}
        spell_out_glu(graph, node, given["input"], given.get("dim", -1))
    elif node.op == "call_method" and node.target in _BY_EXAMPLE and not node.kwargs:
        with graph.inserting_before(node):
            shape = graph.call_function(getattr, (node.args[1], "shape"))
        node.target = _BY_EXAMPLE[str(node.target)]
        node.args = (node.args[0], shape)
    if node.op == "call_method" and node.target == "view" and not _is_of_type(node):
        node.target = "reshape"
    elif node.target in _EXTREMES:
        _spell_out_extreme(graph, node)


def spell_out_glu(graph: fx.Graph, node: fx.Node, x: Any, dim: Any) -> None:
    """Take a gated linear unit apart: one half times the sigmoid of the other."""
    with graph.inserting_before(node):
        halves = graph.call_function(torch.chunk, (x, 2, dim))
        one, gate = (graph.call_function(operator.getitem, (halves, at)) for at in range(2))
        opened = graph.call_function(torch.sigmoid, (gate,))
        result = graph.call_function(torch.mul, (one, opened))
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _spell_out_linear(graph: fx.Graph, node: fx.Node) -> None:
    """Name the arguments by position, and add a bias that is no parameter separately."""
    names = ("input", "weight", "bias")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    bias = given.get("bias")
    computed = isinstance(bias, fx.Node) and bias.op != "get_attr"
    kept = (given["input"], given["weight"]) + (() if computed or bias is None else (bias,))
    node.args, node.kwargs = kept, {}
    if computed:
        with graph.inserting_after(node):
            added = graph.call_function(torch.add, (node, bias))
        node.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added)


def _is_of_type(node: fx.Node) -> bool:
    return bool(node.kwargs) or any(isinstance(size, torch.dtype) for size in node.args[1:])


def _spell_out_extreme(graph: fx.Graph, node: fx.Node) -> None:
    """Name the larger of two tensors as such, and the largest values along a dimension."""
    of_two, along = _EXTREMES[node.target]
    if _is_of_two(node):
        node.op, node.target = "call_function", of_two
        return
    names = ("input", "dim", "keepdim")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    takers = [user for user in node.users if user.users]
    if not isinstance(given.get("dim"), int | fx.Node) or not all(map(_takes_values, takers)):
        return
    with graph.inserting_before(node):
        arguments = (given["input"], given["dim"], given.get("keepdim", False))
        values = graph.call_function(along, arguments)
    for user in takers:
        user.replace_all_uses_with(values)
    for user in list(node.users):
        graph.erase_node(user)
    graph.erase_node(node)


def _takes_values(user: fx.Node) -> bool:
    """Whether a reader of (values, indices) takes the values alone."""
    asked = {operator.getitem: 0, getattr: "values"}
    return user.target in asked and bool(user.args[1] == asked[user.target])


def _is_of_two(node: fx.Node) -> bool:
    """Whether a maximum is that of two tensors, rather than along a dimension."""
    others = [*node.args[1:], *node.kwargs.values()]
    one = len(others) == 1 and isinstance(others[0], fx.Node) and not node.kwargs.keys() - {"other"}
    # A node may be a computed dimension: what is given then is taken apart.
    return one and not any(map(_is_item, node.users))


def _is_item(user: fx.Node) -> bool:
    field = user.target is getattr and user.args[1] in ("values", "indices")
    return field or (user.target is operator.getitem and type(user.args[1]) is int)


def spell_out_shapes(graph: fx.Graph) -> bool:
    """Give shapes that reach a view as one value dimension by dimension; returns whether any did.

    Args:
        graph: with recorded examples, which tell how many dimensions a shape has.
    """
    found = False
    for node in list(graph.nodes):
        sized = node.op == "call_method" and node.target in ("view", "reshape", "expand")
        if not sized and node.target is not torch.reshape or len(node.args) != 2:
            continue
        shape: Any = node.args[1]
        example = seen(shape).example if isinstance(shape, fx.Node) and was_seen(shape) else None
        if not isinstance(example, tuple):
            continue
        with graph.inserting_before(node):
            sizes = [graph.call_function(operator.getitem, (shape, d)) for d in range(len(example))]
        node.args = (node.args[0], tuple(sizes))
        found = True
    return found


def spell_out_kinds(graph: fx.Graph) -> bool:
    """Ask another tensor for type and device alone, in y.type_as(x) and y.to(x); whether any did.

    It gives neither values nor shape.

    Args:
        graph: with recorded examples, which tell a tensor from a type.
    """
    found = False
    for node in list(graph.nodes):
        other = node.args[1] if node.op == "call_method" and len(node.args) == 2 else None
        if node.target not in ("type_as", "to") or not isinstance(other, fx.Node) or node.kwargs:
            continue
        if not was_seen(other) or not isinstance(seen(other).example, torch.Tensor):
            continue
        with graph.inserting_before(node):
            asked = [graph.call_function(getattr, (other, of)) for of in ("device", "dtype")]
        node.target, node.args = "to", (node.args[0], *asked)
        found = True
    return found


def _spell_out_stack(graph: fx.Graph, node: fx.Node) -> None:
    """Concatenate along a new dimension."""
    parts: Any = node.args[0] if node.args else node.kwargs["tensors"]
    dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if not isinstance(parts, list | tuple) or not isinstance(dim, int):
        return
    with graph.inserting_before(node):
        longer = [graph.call_method("unsqueeze", (part, dim)) for part in parts]
        joined = graph.call_function(torch.cat, (longer, dim))
    node.replace_all_uses_with(joined)
    graph.erase_node(node)


def _spell_out_repeats(graph: fx.Graph, node: fx.Node) -> None:
    """Give a part that is concatenated with itself another name each time."""
    parts: Any = node.args[0] if node.args else node.kwargs.get("tensors")
    if not isinstance(parts, list | tuple) or len(set(parts)) == len(parts):
        return
    named: list[Any] = []
    for part in parts:
        with graph.inserting_before(node):
            named.append(graph.call_method("contiguous", (part,)) if part in named else part)
    rest = {name: value for name, value in node.kwargs.items() if name != "tensors"}
    node.args, node.kwargs = (named, *node.args[1:]), rest


def _spell_out_scatter(graph: fx.Graph, node: fx.Node) -> None:
    """Concatenate what is left on both sides of a slice and what replaces it."""
    selects = node.target is torch.select_scatter
    names = ("input", "src", "dim", *(("index",) if selects else ("start", "end", "step")))
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    dim, x, source = given.get("dim", 0), given["input"], given["src"]
    if selects:
        start = given["index"]
        end = start + 1 or None if isinstance(start, int) else start
    else:
        start, end = given.get("start") or 0, given.get("end")
    if not isinstance(dim, int) or given.get("step", 1) != 1 or not _is_in_order(start, end):
        return
    with graph.inserting_before(node):
        if selects:
            source = graph.call_method("unsqueeze", (source, dim))
        parts = [source]
        if start != 0:
            parts.insert(0, _slice(graph, x, dim, slice(None, start)))
        if end is not None:
            parts.append(_slice(graph, x, dim, slice(end, None)))
        joined = graph.call_function(torch.cat, (parts, dim))
    node.replace_all_uses_with(joined)
    graph.erase_node(node)


def _is_in_order(start: Any, end: Any) -> bool:
    """Whether a slice ends behind its start at any size, so that two others are what is left."""
    if not isinstance(start, int) or not isinstance(end, int | None):
        return False
    return end is None or start == 0 or (start <= end and (start < 0) == (end < 0))


def _slice(graph: fx.Graph, x: Any, dim: int, kept: slice) -> fx.Node:
    whole: tuple[Any, ...] = (slice(None),) * (dim if dim >= 0 else -dim - 1)
    key: tuple[Any, ...] = (*whole, kept) if dim >= 0 else (..., kept, *whole)
    return graph.call_function(operator.getitem, (x, key))
