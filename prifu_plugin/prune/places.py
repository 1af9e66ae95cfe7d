"""Where the modules of the original end in a pruned graph, for those who cut it there."""

from __future__ import annotations

from typing import Any

from torch import fx

from prifu_plugin.prune.seen import seen, was_seen

PLACES = "prifu_places"
"""Key of a pruned model's meta: module path -> [position among the calls, what is called]."""


def places(old: fx.Graph, new: fx.Graph, values: dict[fx.Node, Any]) -> dict[str, list[Any]]:
    """Return the last call that each module of the original makes.

    Args:
        old: the original's graph, whose nodes know their modules.
        new: the pruned graph.
        values: node of the original -> its node in the pruned graph, or None.

    Returns:
        Plain data, by module path; positions survive what renames nodes.
    """
    position = {node: at for at, node in enumerate(calls(new))}
    found: dict[str, list[Any]] = {}
    for node in old.nodes:
        if not was_seen(node) or not seen(node).shape:
            continue
        for entry in (node.meta.get("nn_module_stack") or {}).values():
            path, value = str(entry[0]), values.get(node)
            found.pop(path, None)
            if path and value in position:
                found[path] = [position[value], _called(value)]
    return found


def place(graph: fx.Graph, known: dict[str, list[Any]], path: str) -> fx.Node | None:
    """Return the node at which a module of the original ends, None if that is not known."""
    if path not in known:
        return None
    at, called = known[path]
    listed = calls(graph)
    fits = at < len(listed) and _called(listed[at]) == called
    return listed[at] if fits else None


def calls(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes that compute something."""
    return [node for node in graph.nodes if node.op.startswith("call_")]


def _called(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))
