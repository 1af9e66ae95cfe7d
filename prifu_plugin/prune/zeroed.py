"""Branches that start at 0, as LoRA and zero convolutions do: gone, though training wakes them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, fx

from prifu_plugin.prune.elementwise import PRODUCTS
from prifu_plugin.prune.rules.base import Analysis
from prifu_plugin.prune.rules.contraction import MatmulRule
from prifu_plugin.prune.rules.linear import LinearRule
from prifu_plugin.prune.seen import seen


def zeroed(analysis: Analysis) -> list[tuple[str, str]]:
    """Note linear maps and factors that are 0 everywhere and trained: what they meet is constant.

    Args:
        analysis: with its rules.
    """
    why = "it is 0: what leads to it alone is gone, and cannot be trained again"
    found = {}
    for node, rule in analysis.rules.items():
        if isinstance(rule, LinearRule):
            if not rule.map.connected.any():
                found.update(dict.fromkeys(_weights(node), why))
        elif isinstance(rule, MatmulRule) or node.target in PRODUCTS:
            for factor in node.all_input_nodes:
                if _is_zero(analysis, factor):
                    found.update(dict.fromkeys(_parameters(factor), why))
    return list(found.items())


def _weights(node: fx.Node) -> Iterator[str]:
    if node.op == "call_module":
        yield f"{node.target}.weight"
    else:
        for source in node.all_input_nodes[1:2]:
            yield from _parameters(source)


def _is_zero(analysis: Analysis, node: fx.Node) -> bool:
    return seen(node).is_static and not bool(analysis.fact(node).const.any())


def _parameters(node: fx.Node) -> Iterator[str]:
    """Yield the trained parameters that a tensor is made of."""
    value = seen(node).static
    if node.op == "get_attr" and isinstance(value, Tensor) and value.requires_grad:
        yield str(node.target)
    for source in node.all_input_nodes:
        yield from _parameters(source)
