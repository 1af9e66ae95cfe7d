"""The rules of the analysis, one file a kind of operation; `find_rule` is where they are tried."""

from __future__ import annotations

import torch
from torch import fx

from prifu_plugin.prune.facts import Fact, is_fact_tuple
from prifu_plugin.prune.hooks import LOST, has_hooks
from prifu_plugin.prune.rules.along import along_rule
from prifu_plugin.prune.rules.base import Analysis, Rule
from prifu_plugin.prune.rules.channelwise import channelwise_rule, padding_rule
from prifu_plugin.prune.rules.concat import concat_rule
from prifu_plugin.prune.rules.contraction import contraction_rule
from prifu_plugin.prune.rules.linear import LinearRule
from prifu_plugin.prune.rules.linear_map import linear_map
from prifu_plugin.prune.rules.movement import movement_rule
from prifu_plugin.prune.rules.norm import norm_rule
from prifu_plugin.prune.rules.opaque import InputRule, OpaqueRule, ScalarRule, StaticRule
from prifu_plugin.prune.rules.pointwise import pointwise_rule
from prifu_plugin.prune.rules.sampling import sampling_rule
from prifu_plugin.prune.rules.tagged import tagged_rule
from prifu_plugin.prune.seen import seen

_LAYERS = (torch.nn.Linear, torch.nn.modules.conv._ConvNd)

_RECOGNIZED = (
    *(pointwise_rule, channelwise_rule, concat_rule, contraction_rule, along_rule),
    sampling_rule,
)


def find_rule(analysis: Analysis, node: fx.Node) -> Rule:
    """Return the rule that holds for a node; the opaque one, noted, if there is no other."""
    if node.op == "placeholder":
        return InputRule(node) if seen(node).shape else ScalarRule(node)
    if seen(node).is_static:
        if node.op == "call_module" and isinstance(analysis.module(node), _LAYERS):
            note = "it gives the same for every input; it stays, so that it can be trained"
            analysis.notes.append((node.name, note))
        return StaticRule(node)
    if seen(node).varies:
        return OpaqueRule(node, "a parameter cut to the size of the input")
    if seen(node).nested or any(seen(n).nested for n in node.all_input_nodes):
        return OpaqueRule(node, _describe(analysis, node))
    if not seen(node).shape:
        return ScalarRule(node)
    facts = [analysis.values[s] for s in node.all_input_nodes]
    if all(isinstance(f, Fact) or not is_fact_tuple(f) for f in facts):
        linear = linear_map(analysis, node)
        if linear is not None:
            return LinearRule(node, linear)
        found = norm_rule(analysis, node) if node.op == "call_module" else None
        for recognize in _RECOGNIZED:
            found = found or recognize(analysis, node)
        if found is not None:
            return found
    # Padding by 0 is a movement, which knows more of constants.
    found = movement_rule(analysis, node) or padding_rule(analysis, node)
    found = found or tagged_rule(analysis, node)
    return found or OpaqueRule(node, _describe(analysis, node))


def analyse(root: torch.nn.Module, graph: fx.Graph) -> Analysis:
    """Find a rule for each node and the constants it leaves.

    Args:
        root: the model in eval mode, fp64.
        graph: the lowered graph, with examples recorded by `prifu_plugin.prune.examples`.
    """
    analysis = Analysis(root, graph)
    for node in graph.nodes:
        if node.op == "output":
            continue
        if node.op == "call_module" and any(map(has_hooks, analysis.module(node).modules())):
            analysis.notes.append((node.name, LOST))
        rule = find_rule(analysis, node)
        analysis.rules[node] = rule
        analysis.values[node] = rule.const(analysis)
    return analysis


def _describe(analysis: Analysis, node: fx.Node) -> str:
    if node.op == "call_module":
        return f"{type(analysis.module(node)).__name__} at '{node.target}'"
    return getattr(node.target, "__name__", str(node.target))


__all__ = ["Analysis", "analyse", "find_rule"]
