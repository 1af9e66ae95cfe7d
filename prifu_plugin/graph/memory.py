"""Which nodes of a graph may share memory: views, casts that change nothing, parts of a tensor."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from prifu_plugin.names import LAYOUT_QUERIES, SIZE_QUERIES

_VIEWS = {
    *("view", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "squeeze"),
    *("unsqueeze", "expand", "narrow", "select", "chunk", "split", "unbind", "movedim", "detach"),
    *("contiguous", "getitem", "diagonal", "swapaxes", "swapdims", "view_as", "expand_as"),
    *("moveaxis", "ravel", "unfold", "as_strided", "broadcast_to", "tensor_split", "hsplit"),
    *("vsplit", "dsplit", "to", "type", "type_as", "real", "imag", "view_as_real"),
    *("cpu", "cuda", "pos", "positive", "resolve_conj"),
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"),
    "resolve_neg",
}
_VIEWING = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)
_VIEWING_ATTRIBUTES = {"T", "mT", "H", "mH", "data", "real", "imag"}
"""What may return the memory it is given: views, casts that change nothing, dropout in eval."""

_CASTS = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}
"""What returns the memory it is given if that is of this type, and copies otherwise."""

_BY_EXAMPLE = {"view_as", "expand_as", "reshape_as", "to", "type_as"}


def sharing(node: fx.Node, model: nn.Module) -> dict[fx.Node, fx.Node | None]:
    """Return the nodes that may share memory with one, through views of it or above it.

    Returns:
        Each node, with the part of it that has this memory; None for all of it.
    """
    found: dict[fx.Node, fx.Node | None] = {node: None}
    left = [node]
    while left:
        at = left.pop()
        near: list[tuple[fx.Node, fx.Node | None]] = [
            (user, None)
            for user in at.users
            if is_view(user, model) and user.args[0] is at and not are_apart(user, found[at])
        ]
        if is_view(at, model) and isinstance(at.args[0], fx.Node):
            near.append((at.args[0], at))
        for other, part in near:
            if other not in found:
                found[other] = part
                left.append(other)
    return found


def readers(node: fx.Node, part: fx.Node | None) -> list[fx.Node]:
    """Return who reads the values of a node, or of a part of it, rather than its shape or type."""
    return [user for user in node.users if _reads(user, node) and not are_apart(user, part)]


def is_view(node: fx.Node, model: nn.Module) -> bool:
    """Whether a node may return the memory of its first argument."""
    if node.op == "call_module":
        return isinstance(model.get_submodule(str(node.target)), _VIEWING)
    if node.target is getattr:
        return node.args[1] in _VIEWING_ATTRIBUTES
    name = _name(node)
    if name in _CASTS:
        return any(p.dtype == _CASTS[name] for p in model.parameters())
    return bool(node.args) and name in _VIEWS


def are_apart(one: fx.Node, other: fx.Node | None) -> bool:
    """Whether two nodes are parts of one tensor, or items of one tuple, that share no element."""
    if other is None or one.target is not operator.getitem or other.target is not operator.getitem:
        return False
    return one.args[0] is other.args[0] and keys_are_apart(one.args[1], other.args[1])


def keys_are_apart(one: Any, other: Any) -> bool:
    """Whether two keys choose no common element, whatever the sizes are.

    Example:
        >>> keys_are_apart((slice(None), slice(None, 4)), (slice(None), slice(4, None)))
        True
        >>> keys_are_apart(slice(None, 4), slice(-4, None))
        False
    """
    both = [key if isinstance(key, tuple) else (key,) for key in (one, other)]
    for first, second in zip(*both, strict=False):
        if not all(type(key) in (int, slice) for key in (first, second)):
            return False
        if _are_apart_along(first, second):
            return True
    return False


def _are_apart_along(one: Any, other: Any) -> bool:
    if type(one) is int and type(other) is int:
        return one != other and (one < 0) == (other < 0)
    if type(one) is int or type(other) is int:
        return False
    return _ends_before(one, other) or _ends_before(other, one)


def _ends_before(one: slice, other: slice) -> bool:
    end, start = one.stop, other.start
    if end is None or start is None or one.step not in (None, 1) or other.step not in (None, 1):
        return False
    if end is start:
        return True
    if type(end) is not int or type(start) is not int:
        return False
    return end <= start and (end < 0) == (start < 0)


def _reads(user: fx.Node, node: fx.Node) -> bool:
    name = _name(user)
    if user.target is getattr:
        return user.args[1] not in SIZE_QUERIES | LAYOUT_QUERIES
    if name in SIZE_QUERIES | LAYOUT_QUERIES or name.endswith("_like") or name.startswith("new_"):
        return False
    return not (name in _BY_EXAMPLE and user.args[:1] != (node,))


def _name(node: fx.Node) -> str:
    named = node.op == "call_method"
    return str(node.target) if named else str(getattr(node.target, "__name__", ""))
