"""The sound default: an operation nothing is known of needs all inputs whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from prifu_plugin.filter import PriFU
from prifu_plugin.names import SIZE_QUERIES, value_at
from prifu_plugin.prune.facts import Fact, first_channel, live_everywhere, tensor_inputs
from prifu_plugin.prune.plan import Keep
from prifu_plugin.prune.planner import Planner
from prifu_plugin.prune.rules.base import Analysis, Rule, run
from prifu_plugin.prune.seen import seen


class OpaqueRule(Rule):
    """All outputs live, all inputs needed, the operation as it is.

    Args:
        node: the node.
        what: how the report names its operation.
    """

    def __init__(self, node: fx.Node, what: str) -> None:
        super().__init__(node)
        self.what = what

    def const(self, analysis: Analysis) -> Any:
        """Know nothing."""
        shapes = seen(self.node).shape
        if not shapes:
            return None
        if seen(self.node).several:
            return tuple(live_everywhere(shape) for shape in shapes)
        return live_everywhere(shapes)

    def need(self, analysis: Analysis) -> dict[fx.Node, Tensor]:
        """Need everything, if the result is needed."""
        fact = analysis.values[self.node]
        if isinstance(fact, Fact) and not analysis.need[self.node].any():
            return {}
        return self._all(analysis)

    def want(self, analysis: Analysis) -> dict[fx.Node, Tensor]:
        """Each input must exist, for its shape."""
        return {
            source: first_channel(analysis.fact(source))
            for source in self.sources(analysis)
            if not analysis.fact(source).static and not analysis.wanted(source).any()
        }

    def plan(self, planner: Planner) -> None:
        """Make the inputs whole."""
        analysis = planner.analysis
        fact = analysis.values[self.node]
        if isinstance(fact, Fact) and not analysis.keep[self.node].any():
            return
        operands = {
            source: planner.conform(source, self.node)
            for source in tensor_inputs(self.node, analysis.values)
            if isinstance(analysis.values[source], Fact) and not analysis.fact(source).static
        }
        if self._is_returned():
            pass  # what a model returns is whole, in whatever it is returned
        elif any(not conform.is_identity for conform in operands.values()):
            analysis.notes.append((self.node.name, f"no rule for {self.what}: inputs made whole"))
        elif self._holds_filters(analysis):
            analysis.notes.append((self.node.name, f"{self.what} is kept whole, with its filters"))
        planner.emit(self.node, Keep(), operands)

    def _is_returned(self) -> bool:
        """Whether this makes the dictionary or the like in which a model returns tensors."""
        made = isinstance(self.node.target, type)
        return made and all(user.op == "output" for user in self.node.users)

    def _holds_filters(self, analysis: Analysis) -> bool:
        return self.node.op == "call_module" and any(
            isinstance(module, PriFU) for module in analysis.module(self.node).modules()
        )

    def _all(self, analysis: Analysis) -> dict[fx.Node, Tensor]:
        return {
            source: torch.ones(analysis.fact(source).summary_shape(), dtype=torch.bool)
            for source in tensor_inputs(self.node, analysis.values)
            if isinstance(analysis.values[source], Fact)
        }


class InputRule(Rule):
    """An input of the model: live, and whole in the pruned model too."""

    def const(self, analysis: Analysis) -> Fact:
        """Know nothing."""
        return live_everywhere(seen(self.node).shape)

    def need(self, analysis: Analysis) -> dict[fx.Node, Tensor]:
        """Has no inputs."""
        return {}

    def plan(self, planner: Planner) -> None:
        """Stay."""
        planner.emit(self.node, Keep())


class StaticRule(Rule):
    """Computed from parameters alone: stays live code, so that it stays trainable."""

    def const(self, analysis: Analysis) -> Any:
        """The values themselves, computed anew in fp64: the recorded run was in the model's own."""
        value = self._precise(analysis)
        if isinstance(value, tuple | list):
            return tuple(Fact(tuple(v.shape), (), v.double(), static=True) for v in value)
        return Fact(tuple(value.shape), (), value.detach().double(), static=True)

    def _precise(self, analysis: Analysis) -> Any:
        recorded = seen(self.node).static
        if not isinstance(recorded, Tensor) or not recorded.is_floating_point():
            return recorded
        if self.node.op == "get_attr":
            return value_at(analysis.root, str(self.node.target))
        return run(analysis, self.node, lambda source: _value(analysis, source))

    def need(self, analysis: Analysis) -> dict[fx.Node, Tensor]:
        """Its inputs are static too and need no mask."""
        return {}

    def plan(self, planner: Planner) -> None:
        """Stay; a reader that is alone may slice a parameter."""
        planner.emit(self.node, Keep())


def _value(analysis: Analysis, source: fx.Node) -> Any:
    """Return what a static node gave: in fp64 where it is a number, as recorded otherwise."""
    recorded = seen(source).static
    if isinstance(recorded, Tensor) and recorded.is_floating_point():
        return analysis.fact(source).known
    if isinstance(recorded, tuple | list):
        facts = analysis.values[source]
        pairs = zip(recorded, facts, strict=True)
        return tuple(f.known if v.is_floating_point() else v for v, f in pairs)
    return analysis.values[source] if recorded is None else recorded


class ScalarRule(Rule):
    """A size, a number, a tuple of sizes: no tensor."""

    def const(self, analysis: Analysis) -> Any:
        """The value in the analysed run."""
        return seen(self.node).example

    def need(self, analysis: Analysis) -> dict[fx.Node, Tensor]:
        """A size asks for existence, not for values; another question for the whole tensor."""
        return self._whole(analysis)

    def want(self, analysis: Analysis) -> dict[fx.Node, Tensor]:
        """Another question than for a size is asked of the whole tensor."""
        return self._whole(analysis)

    def _whole(self, analysis: Analysis) -> dict[fx.Node, Tensor]:
        attribute = self.node.args[1] if self.node.target is getattr else self.node.target
        if attribute in SIZE_QUERIES or self.node.op == "placeholder":
            return {}
        return {
            source: torch.ones(analysis.fact(source).summary_shape(), dtype=torch.bool)
            for source in self.sources(analysis)
        }

    def plan(self, planner: Planner) -> None:
        """Stay if what it asks about does; rewriting answers with original sizes."""
        if all(planner.exists(source) for source in self.node.all_input_nodes):
            planner.emit(self.node, Keep(), {}, {})
