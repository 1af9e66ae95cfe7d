"""Operations along a dimension that is no channel's: softmax over tokens, unit length."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from prifu_plugin.prune.facts import Fact
from prifu_plugin.prune.rules.base import Analysis, Rule
from prifu_plugin.prune.rules.channelwise import ChannelwiseRule

_SOFTMAX = (F.softmax, torch.softmax, "softmax", F.log_softmax, torch.log_softmax, "log_softmax")


class AlongRule(ChannelwiseRule):
    """Each channel by itself, but a constant does not stay what it is: 1/n depends on the size.

    Args:
        node: the node.
        rank: of input and result.
        zeros: whether 0 stays 0.
    """

    def __init__(self, node: fx.Node, rank: int, zeros: bool) -> None:
        super().__init__(node, {dim: dim for dim in range(rank)})
        self.zeros = zeros

    def const(self, analysis: Analysis) -> Fact:
        """Keep zeros where they stay; know nothing of the rest."""
        fact = analysis.fact(self.source)
        zero = (fact.const == 0) & self.zeros
        values = torch.where(zero, 0.0, torch.nan).double()
        return Fact(fact.shape, fact.axes, values)


def along_rule(analysis: Analysis, node: fx.Node) -> Rule | None:
    """Return the rule for a softmax or a normalization along one dimension, or None."""
    fact = analysis.input_fact(node)
    if fact is None or fact.static:
        return None
    zeros = node.target is F.normalize
    dim = _dim(analysis, node)
    if not isinstance(dim, int) or dim % len(fact.shape) in fact.axes:
        return None
    return AlongRule(node, len(fact.shape), zeros)


def _dim(analysis: Analysis, node: fx.Node) -> Any:
    if node.op == "call_module":
        module = analysis.module(node)
        return module.dim if type(module) in (nn.Softmax, nn.LogSoftmax) else None
    if node.target in _SOFTMAX:
        return node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if node.target is F.normalize and node.kwargs.get("p", 2) == 2 and len(node.args) < 4:
        given = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 1)
        return given if len(node.args) < 2 or node.args[1] == 2 else None
    return None
