"""A pruned graph as torch.load makes it again: by tracing its code once more."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from prifu_plugin.errors import first_line
from prifu_plugin.graph.undisturbed import undisturbed

_MADE: dict[Any, str] = {
    torch.zeros: "new_zeros",
    torch.ones: "new_ones",
    torch.empty: "new_empty",
    torch.full: "new_full",
}


def make_loadable(graph: fx.Graph) -> None:
    """Let a tensor make others of computed sizes, in place: torch.zeros itself takes no proxies.

    Args:
        graph: a pruned one.
    """
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _MADE or not node.all_input_nodes:
            continue
        of = _tensor_asked(node)
        if of is None or not node.kwargs.keys() <= {"size", "fill_value", "dtype", "device"}:
            continue
        sizes, *filled = _arguments(node)
        kwargs = {k: node.kwargs.get(k) for k in ("dtype", "device")}
        if kwargs["dtype"] is None:
            if any(isinstance(value, fx.Node) for value in filled):
                continue  # whose type it would have
            kwargs["dtype"] = torch.full((), *(filled or [0.0])).dtype
        if kwargs["device"] is None:
            kwargs["device"] = torch.get_default_device()
        with graph.inserting_before(node):
            made = graph.call_method(_MADE[node.target], (of, sizes, *filled), kwargs)
        made.meta.update(node.meta)
        node.replace_all_uses_with(made)
        graph.erase_node(node)


def why_not_loadable(pruned: fx.GraphModule) -> str | None:
    """Return why torch.load could not read a model that torch.save wrote whole; None if it can."""
    try:
        with undisturbed(pruned):
            _Kept().trace(pruned)
    except Exception as error:  # noqa: BLE001 - whatever tracing raises, loading would
        return first_line(error).rstrip(".")
    return None


class _Kept(fx.Tracer):
    """Trace as torch.load does: no module is looked into."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module stays one call."""
        return True


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    """Return the sizes that a new tensor is to have, and for torch.full what fills it."""
    args = list(node.args)
    if node.target is torch.full:
        sizes = args.pop(0) if args else node.kwargs["size"]
        return sizes, args[0] if args else node.kwargs["fill_value"]
    if not args:
        return (node.kwargs["size"],)
    return (args[0] if len(args) == 1 else tuple(args),)  # one size, or a shape


def _tensor_asked(node: fx.Node) -> fx.Node | None:
    """Return a tensor whose size the arguments of a call come from."""
    left, met = list(node.all_input_nodes), set()
    while left:
        one = left.pop()
        if one in met:
            continue
        met.add(one)
        of_size = one.op == "call_method" and one.target == "size"
        of_shape = one.target is getattr and one.args[1:] == ("shape",)
        if (of_size or of_shape) and isinstance(one.args[0], fx.Node):
            return one.args[0]
        left += one.all_input_nodes
    return None
