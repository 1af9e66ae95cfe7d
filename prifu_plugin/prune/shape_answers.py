"""What a pruned graph answers when its forward asks for a shape."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from prifu_plugin.prune.nodes import first_input
from prifu_plugin.prune.plan import NodePlan
from prifu_plugin.prune.seen import seen

_COMPARISONS = (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)
"""Sizes are compared when the model runs; the nodes that stand for them are never equal."""


class ShapeAnswers:
    """Answer with the original size where channels are gone, else with what the input has.

    Args:
        new: graph that is being built.
        plans: by the names of the original nodes.
        values: what stands in the new graph for each original node so far.
    """

    def __init__(
        self, new: fx.Graph, plans: dict[str, NodePlan], values: dict[fx.Node, Any]
    ) -> None:
        self.new = new
        self.plans = plans
        self.values = values

    def answer(self, node: fx.Node, translate: Callable[[Any], Any]) -> Any:
        """Return what stands for a node that is no tensor.

        Args:
            node: of the original graph.
            translate: its arguments -> those of the new graph.
        """
        if node.target is getattr and node.args[1] == "shape":
            return self._sizes(first_input(node))
        if node.target == "size":
            sizes = self._sizes(first_input(node))
            dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
            return sizes if dim is None else sizes[dim]
        if node.target in ("numel", "nelement") and isinstance(node.args[0], fx.Node):
            asked = self.values[node.args[0]]
            return self._product(asked if isinstance(asked, tuple) else self._sizes(node.args[0]))
        args = translate(node.args)
        listed = any(isinstance(a, tuple | list) for a in args)
        listed = listed and not any(isinstance(a, fx.Node) for a in args)
        if listed and callable(node.target) and node.target not in _COMPARISONS:
            return node.target(*args)
        kwargs = translate(node.kwargs)
        if not _has_nodes((args, kwargs)):
            return seen(node).example
        return self.new.create_node(node.op, node.target, tuple(args), kwargs)

    def _sizes(self, source: fx.Node) -> tuple[Any, ...]:
        plan = self.plans.get(source.name)
        layout = dict(plan.layout) if plan is not None else {}
        shape, value = seen(source).shape, self.values[source]
        return tuple(
            shape[d] if d in layout else self.new.call_method("size", (value, d))
            for d in range(len(shape))
        )

    def _product(self, sizes: tuple[Any, ...]) -> Any:
        total: Any = 1
        for size in sizes:
            total = self.new.call_function(operator.mul, (total, size))
        return total


def _has_nodes(value: Any) -> bool:
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    return bool(found)
