"""Operations on each element: activations, sums, products."""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from prifu_plugin.prune.elementwise import (
    FILLS,
    POINTWISE,
    PRODUCTS,
    SCALINGS,
    SUMS,
    is_pointwise_module,
)
from prifu_plugin.prune.facts import Fact, any_over, first_channel, summarize, tensor_inputs
from prifu_plugin.prune.layout import Conform, Layout
from prifu_plugin.prune.plan import Alias, Keep, Parameter
from prifu_plugin.prune.planner import Planner
from prifu_plugin.prune.rules.base import Analysis, Rule, run
from prifu_plugin.prune.rules.moving import cheaper_computed, work_before
from prifu_plugin.prune.seen import seen


class PointwiseRule(Rule):
    """An operation whose result at an element depends on its operands there, with broadcasting."""

    def const(self, analysis: Analysis) -> Fact:
        """Run the operation on the constants; a product with a known 0 is 0."""
        shape = seen(self.node).shape
        facts = {n: analysis.fact(n) for n in tensor_inputs(self.node, analysis.values)}
        known = {n: as_seen(n, _right(fact.known, len(shape))) for n, fact in facts.items()}
        out = run(analysis, self.node, lambda n: known[n] if n in known else analysis.values[n])
        live = torch.zeros([1] * len(shape), dtype=torch.bool)
        for fact in facts.values() if self.node.target not in FILLS else ():
            live = live | _right(fact.live, len(shape))
        if self.node.target in PRODUCTS:
            for source in facts:
                zero = (known[source] == 0) & ~_right(facts[source].live, len(shape))
                live = live & ~zero
        if any(n not in facts and n.op != "get_attr" for n in self.node.all_input_nodes):
            # A size may stand in the formula: what it makes of constants holds at one resolution,
            # but for what it makes of 0.
            live = live | ~self._scaled_zero(facts, shape)
        axes = sorted(
            {
                dim + len(shape) - len(fact.shape)
                for fact in facts.values()
                if not fact.static
                for dim in fact.axes
                if fact.shape[dim] != 1
            }
        )
        values = torch.where(live, torch.nan, out.double())
        return summarize(values, shape, tuple(axes))

    def _scaled_zero(self, facts: dict[fx.Node, Fact], shape: tuple[int, ...]) -> Tensor:
        """Return where a tensor is a known 0 that is only scaled."""
        scaled = list(facts) if self.node.target in PRODUCTS else []
        if self.node.target in SCALINGS:
            scaled += [n for n in self.node.args[:1] if isinstance(n, fx.Node) and n in facts]
        zero = torch.zeros([1] * len(shape), dtype=torch.bool)
        for source in scaled:
            zero = zero | (_right(facts[source].const, len(shape)) == 0)
        return zero

    def need(self, analysis: Analysis) -> dict[fx.Node, Tensor]:
        """Need what is needed here, but not where the other factor is a known 0."""
        wanted = analysis.wanted(self.node)
        needs: dict[fx.Node, Tensor] = {}
        if self.node.target in FILLS:
            return needs
        sources = list(tensor_inputs(self.node, analysis.values))
        for source in sources:
            mask = wanted
            if self.node.target in PRODUCTS:
                for other in sources:
                    fact = analysis.fact(other)
                    if other is not source and not fact.static:
                        zero = (fact.known == 0) & ~fact.live
                        mask = mask & ~_right(zero, wanted.ndim)
            needs[source] = _reduced(mask, analysis.fact(source))
        return needs

    def want(self, analysis: Analysis) -> dict[fx.Node, Tensor]:
        """A constant that is kept here is kept in the operands, which saves a copy."""
        extra = analysis.extra(self.node)
        asked = self._shapes(analysis)
        facts = {s: analysis.fact(s) for s in tensor_inputs(self.node, analysis.values)}
        # Among several operands, a 0 is cheaper filled in than computed.
        several = len(facts) > 1
        for source, fact in facts.items():
            if _full_width(fact, extra):
                visible = fact.const != 0 if several else torch.tensor(True)
                mask = _reduced(extra, fact) & visible
                asked[source] = asked[source] | mask if source in asked else mask
        for source in facts if several and analysis.move_cost else ():
            cheap = cheaper_computed(analysis, self.node, source)
            if cheap is not None:
                asked[source] = asked[source] | cheap if source in asked else cheap
        return asked

    def work(self, analysis: Analysis) -> float:
        """Return what a channel of the widest operand costs."""
        shape = analysis.fact(self.node).summary_shape()
        for source in tensor_inputs(self.node, analysis.values):
            fact = analysis.fact(source)
            if not fact.static and fact.summary_shape() == shape:
                return work_before(analysis, source)
        return float("inf")

    def _shapes(self, analysis: Analysis) -> dict[fx.Node, Tensor]:
        """Ask a dead operand for one channel if the result has its size from it alone."""
        facts = {s: analysis.fact(s) for s in tensor_inputs(self.node, analysis.values)}
        rank = len(analysis.fact(self.node).shape)
        there = [s for s, f in facts.items() if f.static or analysis.wanted(s).any()]
        covered = [
            any(dim >= rank - len(facts[s].shape) and facts[s].shape[dim - rank] > 1 for s in there)
            for dim in range(rank)
        ]
        asked = {}
        for source, fact in facts.items():
            gives = [
                fact.shape[dim - rank] > 1 and not covered[dim]
                for dim in range(rank - len(fact.shape), rank)
            ]
            if source not in there and any(gives):
                asked[source] = first_channel(fact)
        return asked

    def plan(self, planner: Planner) -> None:
        """Bring all operands to the union of what is kept."""
        analysis, kept = planner.analysis, planner.kept(self.node)
        if kept is None:
            return
        fact = analysis.fact(self.node)
        rank = len(fact.shape)
        sources = list(tensor_inputs(self.node, analysis.values))
        wanted = self._order(planner, sources, kept)
        operands = {s: self._operand(planner, s, wanted, rank) for s in sources}
        present = [s for s in sources if planner.exists(s) or analysis.fact(s).static]
        plain = self.node.target in SUMS and not self.node.kwargs and len(self.node.args) == 2
        if plain and len(sources) == 2 and len(present) == 1:
            gone = next(s for s in sources if s not in present)
            known = analysis.fact(gone).known
            same_shape = analysis.fact(present[0]).shape == fact.shape
            if same_shape and not _right(known, rank).any():
                left = present[0]
                planner.emit(self.node, Alias(left.name), {left: operands[left]}, wanted)
                return
        planner.emit(self.node, Keep(), operands, wanted)

    def _order(
        self, planner: Planner, sources: list[fx.Node], kept: dict[int, tuple[int, ...]]
    ) -> dict[int, tuple[int, ...]]:
        """Order channels as the widest operand has them; the others are gathered into it."""
        rank = len(planner.analysis.fact(self.node).shape)
        ordered = {}
        for dim, indices in kept.items():
            asked, lines = set(indices), []
            for source in sources:
                at = dim - rank + len(planner.analysis.fact(source).shape)
                fact = planner.analysis.fact(source)
                if at >= 0 and fact.shape[at] > 1 and planner.exists(source) and not fact.static:
                    lines.append([i for i in planner.physical(source, at) if i in asked])
            first = max(lines, key=len, default=[])
            there = set(first)
            ordered[dim] = tuple(first + [i for i in indices if i not in there])
        facts = {s: planner.analysis.fact(s) for s in sources}
        moving = [s for s in sources if not facts[s].static]
        finite = self.node.target in SUMS or self.node.target in PRODUCTS
        if not moving or not (finite or len(moving) == 1):
            return ordered  # what is not needed and filled with 0 might be divided by
        largest = max(moving, key=lambda s: _size(facts[s]))
        return planner.as_it_comes(largest, ordered, rank - len(facts[largest].shape))

    def _operand(self, planner: Planner, source: fx.Node, wanted: Layout, rank: int) -> Conform:
        fact = planner.analysis.fact(source)
        shift = rank - len(fact.shape)
        target = {d - shift: kept for d, kept in wanted.items() if d >= shift}
        if fact.static:
            return _static_operand(planner, source, target)
        return planner.conform(source, self.node, target)


def pointwise_rule(analysis: Analysis, node: fx.Node) -> Rule | None:
    """Return the rule for a pointwise node, or None for another."""
    if node.op == "call_module":
        return PointwiseRule(node) if is_pointwise_module(analysis.module(node)) else None
    if node.target in POINTWISE:
        facts = [analysis.fact(n) for n in tensor_inputs(node, analysis.values)]
        ranks = max((len(fact.shape) for fact in facts), default=0)
        same = ranks == len(seen(node).shape)
        floating = torch.is_floating_point(seen(node).example)
        return PointwiseRule(node) if same and floating else None
    return None


def as_seen(node: fx.Node, known: Tensor) -> Tensor:
    """Return the constants of a node as its operation takes them: a mask as one of booleans."""
    example = seen(node).example
    kept = not isinstance(example, Tensor) or example.is_floating_point() or example.is_complex()
    return known if kept else known.to(example.dtype)


def _size(fact: Fact) -> int:
    return math.prod(fact.shape)


def _right(values: Tensor, rank: int) -> Tensor:
    """Align dimensions on the right, as broadcasting does."""
    return values.reshape([1] * (rank - values.ndim) + list(values.shape))


def _reduced(mask: Tensor, fact: Fact) -> Tensor:
    """Reduce a mask over the result to the channels of one operand."""
    for _ in range(mask.ndim - len(fact.shape)):
        mask = mask.any(0)
    if fact.static:
        return torch.ones(fact.summary_shape(), dtype=torch.bool)
    return any_over(mask, fact)


def _full_width(fact: Fact, keep: Tensor) -> bool:
    """Whether an operand has the result's channels, rather than being broadcast along them."""
    aligned = _right(fact.const, keep.ndim)
    return not fact.static and aligned.shape == keep.shape


def _static_operand(planner: Planner, source: fx.Node, target: Layout) -> Conform:
    """Slice a parameter that only this node reads; select from any other."""
    fact = planner.analysis.fact(source)
    select = tuple(
        (dim, kept)
        for dim, kept in sorted(target.items())
        if fact.shape[dim] != 1 and kept != tuple(range(fact.shape[dim]))
    )
    if select and source.op == "get_attr" and len(source.users) == 1:
        planner.emit(source, Parameter(select))
        return Conform()
    return Conform(select)
