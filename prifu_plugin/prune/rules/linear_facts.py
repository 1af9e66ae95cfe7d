"""What linear maps tell: how constants and need go through them."""

from __future__ import annotations

from abc import ABC
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, fx

from prifu_plugin.prune.facts import Fact, any_over, summarize
from prifu_plugin.prune.nodes import first_input
from prifu_plugin.prune.rules.base import Analysis, Rule
from prifu_plugin.prune.rules.linear_map import LinearMap
from prifu_plugin.prune.seen import seen

NARROW = 48
"""Live input channels below which a border map is preferred to a carrier."""


class LinearFacts(Rule, ABC):
    """A linear map at one node, as far as facts go."""

    def __init__(self, node: fx.Node, linear: LinearMap) -> None:
        super().__init__(node)
        self.map = linear
        self.source = first_input(node)

    def adds_border(self, analysis: Analysis) -> bool:
        """Whether missing constants at a border are added as a map, rather than carried.

        A carrier is one more channel to compute, here and where it comes from; a map is one more
        pass over the result. Narrow and grouped convolutions are better off with the map.
        """
        if not self.map.mappable or self.map.inputs == 1:
            return False
        if len(analysis.calls.get(analysis.layer_key(self.node), ())) > 1:
            return True  # a carrier would have to carry the same in every call
        live = self._line(self._fact(analysis).live)
        return self.map.groups > 1 or int(live.sum()) < NARROW

    def const(self, analysis: Analysis) -> Fact:
        """Map constants; live if a live input is connected, or a constant meets the border."""
        fact, linear = self._fact(analysis), self.map
        known, live = self._grouped(fact.known), self._grouped(fact.live)
        connected = linear.connected.double()
        out = torch.einsum("...gi,goi->...go", known, linear.weight).flatten(-2) + linear.bias
        reached = torch.einsum("...gi,goi->...go", live.double(), connected) > 0
        if linear.padded:
            reached |= torch.einsum("...gi,goi->...go", (known != 0).double(), connected) > 0
        out = torch.where(reached.flatten(-2), torch.nan, out).movedim(-1, linear.dim)
        shape = tuple(
            linear.groups * linear.outputs if d == linear.dim else size
            for d, size in enumerate(_output_shape(self.node))
        )
        return summarize(out, shape, tuple(sorted({*fact.axes, linear.dim})))

    def need(self, analysis: Analysis) -> dict[fx.Node, Tensor]:
        """Need every input that is connected to a needed, live result."""
        wanted = analysis.wanted(self.node)
        return {self.source: any_over(self._reached_inputs(wanted), analysis.fact(self.source))}

    def want(self, analysis: Analysis) -> dict[fx.Node, Tensor]:
        """Want one constant channel per group to exist if constants meet a zero-padded border.

        A constant that is kept behind a depthwise layer is kept before it, where copies are dear.
        """
        fact, linear = self._fact(analysis), self.map
        extra = analysis.extra(self.node)
        depthwise = linear.inputs == linear.outputs == 1 and extra.shape == fact.const.shape
        if analysis.move_cost and depthwise:
            return {self.source: extra}
        source = analysis.fact(self.source)
        if linear.spans and set(source.axes) - {linear.dim}:
            return {}  # filled in where they are read: they may differ from place to place
        want = torch.zeros(source.summary_shape(), dtype=torch.bool)
        if not linear.padded or want.shape[linear.dim] == 1 or self.adds_border(analysis):
            return {}
        asked = self._line_any(analysis.wants.get(self.source, want))
        size = self._line(fact.known).abs()
        for offset, indices in self._border_constants(analysis):
            # One that exists already for another reader costs nothing.
            carrier = max(indices, key=lambda i: (bool(asked[offset + i]), float(size[offset + i])))
            want.select(linear.dim, offset + carrier).fill_(True)
        return {self.source: want}

    def work(self, analysis: Analysis) -> float:
        """Return the inputs of a row, times its taps."""
        width = int(self._line_any(analysis.wanted(self.source)).sum()) // self.map.groups
        return float(min(max(1, width), self.map.inputs) * self._taps(analysis))

    def work_of_input(self, analysis: Analysis) -> float:
        """Return the rows that read a channel, times its taps."""
        rows = int(self._line_any(analysis.wanted(self.node)).sum()) / self.map.groups
        return rows * self._taps(analysis)

    def _taps(self, analysis: Analysis) -> int:
        if self.node.op != "call_module":
            return 1
        weight = analysis.module(self.node).weight
        return int(weight[0, 0].numel()) if isinstance(weight, Tensor) else 1

    def sliced_dim(self, analysis: Analysis) -> int:
        """Return the dimension it maps."""
        return self.map.dim

    def sliced_form(self, analysis: Analysis) -> Hashable | None:
        """Calls share a slice if the same kernel reads the same number of channels."""
        return (self.map.groups, self.map.outputs, self.map.inputs, self.map.spans)

    def aligned_dim(self, source: fx.Node) -> int | None:
        """Dense linear maps like aligned widths."""
        return self.map.dim if self.map.groups == 1 else None

    def _fact(self, analysis: Analysis) -> Fact:
        """Return the fact of the input; a kernel that spans places sees channels over all of them.

        Where sizes are fixed, places may have facts of their own.
        """
        fact = analysis.fact(self.source)
        if not self.map.spans or fact.axes == (self.map.dim,):
            return fact
        return summarize(fact.const, fact.shape, (self.map.dim,))

    def _grouped(self, values: Tensor) -> Tensor:
        """Move the mapped dimension last and split it into groups."""
        total = self.map.groups * self.map.inputs
        values = values.movedim(self.map.dim, -1)
        values = values.expand(*values.shape[:-1], total)
        grouped: Tensor = values.unflatten(-1, (self.map.groups, self.map.inputs))
        return grouped

    def _reached_inputs(self, outputs: Tensor) -> Tensor:
        mask = outputs.movedim(self.map.dim, -1).unflatten(-1, (self.map.groups, self.map.outputs))
        reached = torch.einsum("...go,goi->...gi", mask.double(), self.map.connected.double()) > 0
        return reached.flatten(-2).movedim(-1, self.map.dim)

    def _line(self, summary: Tensor) -> Tensor:
        """Return a summary along the mapped dimension, the others being single or uniform."""
        line = lines_along(summary, self.map.dim)[0]
        return line.expand(self.map.groups * self.map.inputs)

    def _line_any(self, summary: Tensor) -> Tensor:
        return lines_along(summary, self.map.dim).any(0)

    def _uniform(self, fact: Fact, missing: Sequence[int]) -> bool:
        """Whether the missing constants are the same over all other channel dimensions."""
        lines = lines_along(fact.known, self.map.dim)
        if lines.shape[-1] == 1 or not missing:
            return True
        lines = lines[:, list(missing)]
        return bool(torch.equal(lines, lines[:1].expand_as(lines)))

    def _border(self, fact: Fact, missing: Sequence[int]) -> list[int]:
        """Return the missing inputs that a zero-padded border makes visible."""
        if not self.map.padded:
            return []
        known = self._line(fact.known).tolist()
        return [i for i in missing if known[i] != 0]

    def _border_constants(self, analysis: Analysis) -> list[tuple[int, list[int]]]:
        """Return (offset, inputs) of groups with constants that kept rows see at the border."""
        linear, fact = self.map, self._fact(analysis)
        computed = self._line_any(analysis.keep[self.node] & analysis.fact(self.node).live)
        computed = computed.unflatten(0, (linear.groups, linear.outputs))
        seen = torch.einsum("go,goi->gi", computed.double(), linear.connected.double()) > 0
        visible = self._line(fact.known).unflatten(0, (linear.groups, linear.inputs)) != 0
        found: dict[int, list[int]] = {}
        for group, index in (seen & visible).nonzero().tolist():
            found.setdefault(group * linear.inputs, []).append(index)
        return list(found.items())


def lines_along(summary: Tensor, dim: int) -> Tensor:
    """Return a summary as lines along a dimension, (all others, C)."""
    return summary.movedim(dim, -1).reshape(-1, summary.shape[dim])


def _output_shape(node: fx.Node) -> tuple[int, ...]:
    shape = seen(node).shape
    assert isinstance(shape, tuple)
    return shape
