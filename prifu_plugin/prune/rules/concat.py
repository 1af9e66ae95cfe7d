"""Concatenation along channels, or along tokens and space."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from prifu_plugin.prune.facts import Fact, any_over, summarize
from prifu_plugin.prune.layout import Conform
from prifu_plugin.prune.plan import Concat
from prifu_plugin.prune.planner import Planner
from prifu_plugin.prune.rules.base import Analysis, Rule
from prifu_plugin.prune.seen import seen


class ConcatRule(Rule):
    """torch.cat of tensors; along channels, each part brings the channels it has."""

    def __init__(self, node: fx.Node, parts: list[fx.Node], dim: int) -> None:
        super().__init__(node)
        self.parts = parts
        self.dim = dim

    def const(self, analysis: Analysis) -> Fact:
        """Concatenate the constants."""
        shape = seen(self.node).shape
        facts = [analysis.fact(part) for part in self.parts]
        axes = {axis for fact in facts for axis in fact.axes}
        values = []
        for fact in facts:
            size = [s if d in axes or d == self.dim else 1 for d, s in enumerate(fact.shape)]
            value = fact.const
            if 0 in fact.shape and self.dim not in axes:
                values.append(self._of_empty(fact, size))
                continue
            for d, s in enumerate(size):
                if s == 1 and value.shape[d] > 1:
                    value = summarize(value, fact.shape, tuple(axes)).const
            values.append(value.expand(size))
        return summarize(torch.cat(values, self.dim), shape, tuple(sorted(axes)))

    def _of_empty(self, fact: Fact, size: list[int]) -> Tensor:
        """Return what is known of a part that is empty here, and need not be at another size."""
        size = [max(s, 1) for s in size]
        if 0 in fact.const.shape:
            return torch.full(size, torch.nan, dtype=torch.float64)
        return fact.const.expand(size)

    def need(self, analysis: Analysis) -> dict[fx.Node, Tensor]:
        """Split need among the parts."""
        return self._split(analysis, analysis.wanted(self.node))

    def want(self, analysis: Analysis) -> dict[fx.Node, Tensor]:
        """Split wants among the parts; between tokens, every part must exist."""
        asked = self._split(analysis, analysis.extra(self.node))
        if self.dim not in analysis.fact(self.node).axes:
            for part, mask in asked.items():
                if not analysis.fact(part).static and not analysis.wanted(part).any():
                    mask.view(-1)[0] = True
        return asked

    def plan(self, planner: Planner) -> None:
        """Concatenate what exists of the parts."""
        analysis = planner.analysis
        fact, layout = analysis.fact(self.node), planner.kept(self.node)
        if layout is None:
            return
        operands: dict[fx.Node, Conform] = {}
        parts: list[int] = []
        order: list[int] = []
        start = 0
        asked = set(layout.get(self.dim, ()))
        for position, part in enumerate(self.parts):
            width = analysis.fact(part).shape[self.dim]
            target = {d: kept for d, kept in layout.items() if d != self.dim}
            if self.dim in fact.axes:
                local = self._local(planner, part, start, width, asked)
                if not local:
                    start += width
                    continue
                target[self.dim] = local
                order.extend(start + index for index in local)
            parts.append(position)
            operands[part] = self._operand(planner, part, target)
            start += width
        if self.dim in fact.axes:
            layout[self.dim] = tuple(order)
        planner.emit(self.node, Concat(self.dim, tuple(parts)), operands, layout)

    def _local(
        self, planner: Planner, part: fx.Node, start: int, width: int, asked: set[int]
    ) -> tuple[int, ...]:
        wanted = tuple(index for index in range(width) if start + index in asked)
        return planner.in_order_of(part, {self.dim: wanted})[self.dim]

    def _operand(
        self, planner: Planner, part: fx.Node, target: dict[int, tuple[int, ...]]
    ) -> Conform:
        fact = planner.analysis.fact(part)
        if fact.static:
            return Conform(
                tuple(
                    (d, kept)
                    for d, kept in sorted(target.items())
                    if fact.shape[d] != 1 and kept != tuple(range(fact.shape[d]))
                )
            )
        return planner.conform(part, self.node, target)

    def _split(self, analysis: Analysis, mask: Tensor) -> dict[fx.Node, Tensor]:
        shape = seen(self.node).shape
        mask = mask.expand([s if d == self.dim else mask.shape[d] for d, s in enumerate(shape)])
        found: dict[fx.Node, Tensor] = {}
        start = 0
        for part in self.parts:
            fact = analysis.fact(part)
            width = fact.shape[self.dim]
            piece = mask.narrow(self.dim, start, width)
            start += width
            own = torch.ones(fact.summary_shape(), dtype=torch.bool)
            if not fact.static:
                own = any_over(piece, fact).clone()
            found[part] = found[part] | own if part in found else own
        return found


def concat_rule(analysis: Analysis, node: fx.Node) -> Rule | None:
    """Return the rule for torch.cat of tensors whose facts are known."""
    if node.target not in (torch.cat, torch.concat, torch.concatenate):
        return None
    parts: Any = node.args[0] if node.args else node.kwargs.get("tensors")
    if not isinstance(parts, list | tuple) or not all(isinstance(p, fx.Node) for p in parts):
        return None
    if not all(isinstance(analysis.values.get(p), Fact) for p in parts):
        return None
    if len(set(parts)) != len(parts):
        return None
    named = node.kwargs.get("dim", node.kwargs.get("axis", 0))
    dim = node.args[1] if len(node.args) > 1 else named
    ranks = {len(analysis.fact(p).shape) for p in parts}
    if not isinstance(dim, int) or ranks != {len(seen(node).shape)}:
        return None
    return ConcatRule(node, list(parts), dim % len(seen(node).shape))
