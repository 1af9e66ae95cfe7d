"""Each channel read at places that another tensor names: warps, spatial transformers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from prifu_plugin.prune.facts import first_channel
from prifu_plugin.prune.plan import Keep
from prifu_plugin.prune.planner import Planner
from prifu_plugin.prune.rules.base import Analysis, Rule
from prifu_plugin.prune.rules.channelwise import ChannelwiseRule


class SamplingRule(ChannelwiseRule):
    """F.grid_sample: the same places of each channel, beyond whose border there may be zeros.

    Args:
        node: the node.
        rank: of input and result.
        grid: the places, which are needed whole.
    """

    def __init__(self, node: fx.Node, rank: int, grid: fx.Node) -> None:
        super().__init__(node, {dim: dim for dim in range(rank)}, border=0.0)
        self.grid = grid

    def need(self, analysis: Analysis) -> dict[fx.Node, Tensor]:
        """Need the same channels, and all places."""
        places = torch.ones(analysis.fact(self.grid).summary_shape(), dtype=torch.bool)
        places &= analysis.wanted(self.node).any()
        return {**super().need(analysis), self.grid: places}

    def want(self, analysis: Analysis) -> dict[fx.Node, Tensor]:
        """Want the same channels; what is constant must exist, for its shape."""
        asked = super().want(analysis)
        for operand in (self.source, self.grid):
            fact = analysis.fact(operand)
            if not fact.static and not analysis.wanted(operand).any():
                asked[operand] = asked.get(operand, first_channel(fact)) | first_channel(fact)
        return asked

    def plan(self, planner: Planner) -> None:
        """Run it on the channels that go on."""
        kept = planner.kept(self.node)
        if kept is None:
            return
        wanted = planner.as_it_comes(self.source, planner.in_order_of(self.source, kept))
        operands = {self.source: planner.conform(self.source, self.node, wanted)}
        if not planner.analysis.fact(self.grid).static:
            operands[self.grid] = planner.conform(self.grid, self.node)
        planner.emit(self.node, Keep(), operands, wanted)


def sampling_rule(analysis: Analysis, node: fx.Node) -> Rule | None:
    """Return the rule for sampling at the places of a grid, or None."""
    if node.target is not F.grid_sample:
        return None
    fact = analysis.input_fact(node)
    grid = node.args[1] if len(node.args) > 1 else node.kwargs.get("grid")
    if fact is None or fact.static or any(axis != 1 for axis in fact.axes):
        return None
    if not isinstance(grid, fx.Node) or grid is node.args[0] or grid not in analysis.values:
        return None
    return SamplingRule(node, len(fact.shape), grid)
