"""What a rule is: how one kind of operation moves constants, need and layouts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from prifu_plugin.prune.facts import Fact
from prifu_plugin.prune.nodes import layer_of, mapped

if TYPE_CHECKING:
    from prifu_plugin.prune.planner import Planner


@dataclass
class Analysis:
    """The facts of a graph, as the passes fill them in.

    Attributes:
        root: the model in eval mode, fp64.
        graph: the lowered graph.
        values: node -> Fact, tuple of facts, or a Python value.
        rules: node -> the rule that holds for it.
        need: node -> mask over its channels: can the output depend on it?
        wants: node -> mask over its channels: what readers asked for so far.
        keep: node -> mask over its channels: must it, or should it, exist?
        notes: (node, reason) for the report, such as that no rule was found.
        movements: what was found of operations that move data, for those that repeat.
        calls: layer -> the nodes that call it, in order; filled when a plan is made.
        move_cost: multiply-accumulates that moving one value is taken to cost.
    """

    root: nn.Module
    graph: fx.Graph
    values: dict[fx.Node, Any] = field(default_factory=dict)
    rules: dict[fx.Node, Rule] = field(default_factory=dict)
    need: dict[fx.Node, Tensor] = field(default_factory=dict)
    wants: dict[fx.Node, Tensor] = field(default_factory=dict)
    keep: dict[fx.Node, Tensor] = field(default_factory=dict)
    notes: list[tuple[str, str]] = field(default_factory=list)
    movements: dict[Hashable, Any] = field(default_factory=dict)
    calls: dict[Hashable, list[fx.Node]] = field(default_factory=dict)
    move_cost: float = 0.0

    def release(self) -> None:
        """Let go of where each value came from, gigabytes in large networks: the plan knows it."""
        self.movements.clear()
        self.rules.clear()

    def fact(self, node: fx.Node) -> Fact:
        """Return the fact of a node that is one tensor."""
        value = self.values[node]
        assert isinstance(value, Fact)
        return value

    def input_fact(self, node: fx.Node) -> Fact | None:
        """Return the fact of a node's first argument, or None if that is no single tensor."""
        first = node.args[0] if node.args else None
        value = self.values.get(first) if isinstance(first, fx.Node) else None
        return value if isinstance(value, Fact) else None

    def wanted(self, node: fx.Node) -> Tensor:
        """Return what must be computed of a node: live and needed."""
        return self.need[node] & self.fact(node).live

    def extra(self, node: fx.Node) -> Tensor:
        """Return what is to exist although nobody needs it computed, for a reader that asked."""
        return self.keep[node] & ~self.wanted(node)

    def module(self, node: fx.Node) -> nn.Module:
        """Return the module a node calls."""
        return self.root.get_submodule(str(node.target))

    def layer_key(self, node: fx.Node) -> Hashable | None:
        """Return what calls of one layer share, None if a node calls nothing that is sliced."""
        rule = self.rules.get(node)
        form = None if rule is None else rule.sliced_form(self)
        return None if form is None else (str(layer_of(node)), form)

    def calls_kept(self, node: fx.Node) -> list[fx.Node]:
        """Return the calls of a node's layer of which anything is to exist."""
        key = self.layer_key(node)
        return [call for call in self.calls[key] if self.keep[call].any()] if key else [node]


class Rule(ABC):
    """One operation at one node, as the analysis sees it."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node

    @abstractmethod
    def const(self, analysis: Analysis) -> Any:
        """Return the fact of the result (or a tuple of facts), from those of the inputs."""

    @abstractmethod
    def need(self, analysis: Analysis) -> dict[fx.Node, Tensor]:
        """Return which channels of each input the needed results depend on."""

    def sources(self, analysis: Analysis) -> list[fx.Node]:
        """Return the tensors the result is made of."""
        return [
            source
            for source in self.node.all_input_nodes
            if isinstance(analysis.values.get(source), Fact)
        ]

    def want(self, analysis: Analysis) -> dict[fx.Node, Tensor]:
        """Return the constant channels of inputs that should be computed, to spare a copy here."""
        return {}

    def sliced_dim(self, analysis: Analysis) -> int:
        """Return the dimension of the result along which the layer's own weights are sliced."""
        raise NotImplementedError

    def sliced_form(self, analysis: Analysis) -> Hashable | None:
        """Return what calls must share to be served by one sliced layer; None if none is."""
        return None

    def spare(self, analysis: Analysis, keep: Tensor) -> Tensor:
        """Widen what is to exist where dropping channels costs more than it saves."""
        return keep

    def work(self, analysis: Analysis) -> float:
        """Return the multiply-accumulates for one more channel at one place; inf if unknown."""
        return float("inf")

    def work_of_input(self, analysis: Analysis) -> float | None:
        """Return the multiply-accumulates of one more input channel at one place, if any."""
        return None

    def aligned_dim(self, source: fx.Node) -> int | None:
        """Return the dimension along which this operation likes aligned widths, if any."""
        return None

    @abstractmethod
    def plan(self, planner: Planner) -> None:
        """Add this node to the plan, given the plans of its inputs."""


def run(
    analysis: Analysis, node: fx.Node, replace: Callable[[fx.Node], Any], module: Any = None
) -> Any:
    """Run a node's operation on other inputs."""
    with torch.no_grad():
        return run_with_gradients(analysis, node, replace, module)


def run_with_gradients(
    analysis: Analysis, node: fx.Node, replace: Callable[[fx.Node], Any], module: Any = None
) -> Any:
    """Run a node's operation on other inputs, in the caller's gradient mode."""
    args, kwargs = mapped(node.args, replace), mapped(node.kwargs, replace)
    if node.op == "call_module":
        return (module or analysis.module(node))(*args, **kwargs)
    if node.op == "call_method":
        target, *rest = args
        return getattr(target, str(node.target))(*rest, **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)
