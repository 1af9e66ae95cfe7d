"""Normalization layers and filters."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, fx, nn

from prifu_plugin.cut import CutFilter
from prifu_plugin.filter import PriFU, along
from prifu_plugin.graph.folding import folded_parameters
from prifu_plugin.graph.folding import folds as can_fold
from prifu_plugin.graph.host import filter_of, is_host
from prifu_plugin.graph.norms import norm_spec
from prifu_plugin.prune.facts import Fact, channels_of, summarize
from prifu_plugin.prune.layout import simplify
from prifu_plugin.prune.nodes import first_input
from prifu_plugin.prune.plan import Scale, SelectNorm, SliceNorm
from prifu_plugin.prune.planner import Planner
from prifu_plugin.prune.quiet import Quiet
from prifu_plugin.prune.rules.base import Analysis, Rule, run
from prifu_plugin.prune.rules.groups import independent_groups
from prifu_plugin.prune.rules.moving import spared, work_before


class ChannelAffineRule(Rule):
    """An affine map per channel: a running normalization, or a filter that stands alone.

    A channel with scale 0 is a constant, whatever comes in.
    """

    def __init__(self, node: fx.Node, module: nn.Module, dim: int, scale: Tensor) -> None:
        super().__init__(node)
        self.module = module
        self.dim = dim
        self.closed = scale == 0
        self.source = first_input(node)

    def const(self, analysis: Analysis) -> Fact:
        """Run the layer on the constants; live where a live channel is open."""
        fact = analysis.fact(self.source)
        dim = self.dim % len(fact.shape)
        summary = list(fact.summary_shape())
        summary[dim] = fact.shape[dim]
        noise = self.module.noise if isinstance(self.module, CutFilter) else 0.0
        with torch.no_grad(), Quiet(self.module):
            out = self.module(fact.known.expand(summary))
        closed = along(self.closed, len(fact.shape), dim)
        live = torch.ones(summary, dtype=torch.bool) if noise else fact.live.expand(summary)
        out = torch.where(live & ~closed, torch.nan, out)
        return summarize(out, fact.shape, tuple(sorted({*fact.axes, dim})))

    def need(self, analysis: Analysis) -> dict[fx.Node, Tensor]:
        """Need the input of each open channel that is needed."""
        fact = analysis.fact(self.source)
        dim = self.dim % len(fact.shape)
        mask = analysis.wanted(self.node) & ~along(self.closed, len(fact.shape), dim)
        return {self.source: mask if dim in fact.axes else mask.any(dim, keepdim=True)}

    def want(self, analysis: Analysis) -> dict[fx.Node, Tensor]:
        """A constant that is kept here is kept in the input, which saves a copy."""
        fact = analysis.fact(self.source)
        if self.dim % len(fact.shape) not in fact.axes:
            return {}
        return {self.source: analysis.extra(self.node)}

    def sliced_dim(self, analysis: Analysis) -> int:
        """Return the channel dimension."""
        return self.dim % len(analysis.fact(self.source).shape)

    def sliced_form(self, analysis: Analysis) -> Hashable | None:
        """Calls always share the layer."""
        return "norm"

    def spare(self, analysis: Analysis, keep: Tensor) -> Tensor:
        """Keep closed channels that other readers of the input need, if leaving them is dearer."""
        if len(self.source.users) == 1:
            return keep
        comes = analysis.wanted(self.source)
        return spared(analysis, self.node, keep, comes) if comes.shape == keep.shape else keep

    def work(self, analysis: Analysis) -> float:
        """Return what a channel of the input costs."""
        return work_before(analysis, self.source)

    def plan(self, planner: Planner) -> None:
        """Slice the layer's own parameters."""
        fact, kept = planner.analysis.fact(self.node), planner.kept(self.node)
        if kept is None:
            return
        dim = self.sliced_dim(planner.analysis)
        wanted = planner.in_order_of(self.source, kept)
        if dim in wanted:
            wanted[dim] = planner.agreed(self.node, lambda: wanted[dim])
        channels = simplify(fact.shape, wanted).get(dim)
        conform = planner.conform(self.source, self.node, wanted)
        if isinstance(self.module, PriFU | CutFilter):
            unit = self.module
            shifted = isinstance(unit, CutFilter) or unit.bias is not None
            noisy = isinstance(unit, CutFilter) and unit.noise > 0
            finest = _finest(unit) if noisy else None
            kernel: Scale | SliceNorm = Scale(self.dim, channels, shifted, noisy, finest)
            if finest is not None:
                planner.analysis.notes.append((self.node.name, KEYED))
        else:
            kernel = SliceNorm(channels)
        planner.emit(self.node, kernel, {self.source: conform}, wanted)


def _finest(unit: nn.Module) -> float | None:
    """Return the least deviation of a filter's noise if a key decides what is drawn."""
    if not isinstance(unit, CutFilter) or unit.key is None:
        return None
    noise = unit.affine()[2].detach()
    return float(noise[noise > 0].min()) if bool((noise > 0).any()) else 1.0


KEYED = "noise with a secret key: needs prifu_plugin to run, exports to no other format"


class StatisticsRule(Rule):
    """A normalization whose statistics need all inputs of a group.

    Closed channels are dropped from its output, and groups that are closed as a whole from its
    input too.

    Args:
        node: the node.
        module: the layer.
        dim: channel dimension.
        closed: mask of the channels its filter closes, None if it has no filter.
        groups: how many groups of channels do not depend on each other.
        centers: whether a mean is subtracted; otherwise zeros stay zeros.
    """

    def __init__(
        self,
        node: fx.Node,
        module: nn.Module,
        dim: int,
        closed: Tensor | None,
        groups: int,
        *,
        centers: bool,
    ) -> None:
        super().__init__(node)
        self.module = module
        self.dim = dim
        self.closed = closed
        self.groups = groups
        self.centers = centers
        self.source = first_input(node)

    def const(self, analysis: Analysis) -> Fact:
        """Closed channels are constant, with the value the layer has on any input.

        So are channels of zeros, where no mean is subtracted from them. If all inputs are constant,
        so is everything: uniform channels have the same statistics at every resolution.
        """
        fact = analysis.fact(self.source)
        dim = self.dim % len(fact.shape)
        axes = tuple(sorted({*fact.axes, dim}))
        if not fact.live.any():
            whole = fact.known.expand(fact.shape)
            out = run(analysis, self.node, lambda n: whole if n is self.source else n)
            return summarize(out, fact.shape, axes)
        still = ~fact.live & (fact.known == 0) & (not self.centers)
        if self.closed is not None:
            still = still | along(self.closed, len(fact.shape), dim)
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(fact.shape, dtype=torch.float64, generator=generator)
        probe = torch.where(fact.live, probe, fact.known)
        out = run(analysis, self.node, lambda n: probe if n is self.source else analysis.values[n])
        return summarize(torch.where(still, out, torch.nan), fact.shape, axes)

    def need(self, analysis: Analysis) -> dict[fx.Node, Tensor]:
        """Need everything of a group of which anything is needed."""
        fact = analysis.fact(self.source)
        wanted = analysis.wanted(self.node)
        dim = self.dim % len(fact.shape)
        if self.groups == 1 or dim not in fact.axes:
            return {self.source: torch.full(fact.summary_shape(), bool(wanted.any()))}
        line = self._by_group(channels_of(wanted, dim))
        return {self.source: along(line, len(fact.shape), dim).expand(fact.summary_shape())}

    def sliced_dim(self, analysis: Analysis) -> int:
        """Return the channel dimension."""
        return self.dim % len(analysis.fact(self.source).shape)

    def sliced_form(self, analysis: Analysis) -> Hashable | None:
        """Calls always share the layer."""
        return "norm"

    def spare(self, analysis: Analysis, keep: Tensor) -> Tensor:
        """Keep closed channels, which come out anyway, if leaving them out is dearer."""
        dim = self.sliced_dim(analysis)
        line = channels_of(keep, dim)
        comes = along(self._by_group(line), keep.ndim, dim) if len(line) > 1 else line.any()
        return spared(analysis, self.node, keep, comes.expand_as(keep))

    def work(self, analysis: Analysis) -> float:
        """Return nothing: closed channels come out anyway."""
        return 0.0

    def _by_group(self, line: Tensor) -> Tensor:
        """Widen a mask over channels to whole groups."""
        some = line.unflatten(0, (self.groups, -1)).any(1)
        whole: Tensor = some.repeat_interleave(len(line) // self.groups)
        return whole

    def plan(self, planner: Planner) -> None:
        """Fold the filter in and select the channels that go on."""
        fact, kept = planner.analysis.fact(self.node), planner.kept(self.node)
        if kept is None:
            return
        dim = self.dim % len(fact.shape)
        layout = simplify(fact.shape, {dim: kept[dim]})
        folded, shifted = True, False
        if is_host(self.module):
            unit, spec = filter_of(self.module), norm_spec(self.module)
            assert isinstance(unit, PriFU)
            assert spec is not None
            folded = can_fold(spec, unit)
            shifted = not folded and unit.bias is not None
        inputs, groups, asked = None, 0, {}
        line = torch.zeros(fact.shape[dim], dtype=torch.bool)
        line[list(kept[dim])] = True
        whole = self._by_group(line)
        if self.groups > 1 and not whole.all():
            inputs = tuple(whole.nonzero().flatten().tolist())
            groups = len(inputs) * self.groups // fact.shape[dim]
            asked = {dim: inputs}
        kernel = SelectNorm(self.dim, layout.get(dim), folded, shifted, inputs, groups)
        conform = planner.conform(self.source, self.node, asked)
        planner.emit(self.node, kernel, {self.source: conform}, layout)


def norm_rule(analysis: Analysis, node: fx.Node) -> Rule | None:
    """Return the rule for a normalization layer or filter, or None for another module."""
    module: Any = analysis.module(node)
    fact = analysis.input_fact(node)
    if fact is None or len(node.all_input_nodes) != 1:
        return None
    rank = len(fact.shape)
    if isinstance(module, PriFU):
        return ChannelAffineRule(node, module, module.dim_at(rank), module.scale().detach())
    if isinstance(module, CutFilter):
        return ChannelAffineRule(node, module, module.dim, module.affine()[0].detach())
    if type(module) is nn.PReLU and module.num_parameters > 1:
        return ChannelAffineRule(node, module, 1, torch.ones_like(module.weight))
    spec = norm_spec(module)
    if spec is None:
        return None
    scale = closed = None
    if is_host(module):
        unit = filter_of(module)
        if not isinstance(unit, PriFU):
            return None
        unit.check_finite()
        closed = unit.closed
        if can_fold(spec, unit):
            scale = folded_parameters(module, unit)["weight"]
    elif getattr(module, "weight", None) is not None:
        scale = module.weight
    if spec.running and (scale is not None or not is_host(module)):
        if scale is None:
            scale = torch.ones_like(module.running_mean)
        return ChannelAffineRule(node, module, spec.dim, scale.detach())
    host = filter_of(module) if is_host(module) else None
    dim = host.dim_at(rank) if isinstance(host, PriFU) else spec.dim_at(rank)
    groups = independent_groups(module, dim, rank) if spec.folds else 1
    return StatisticsRule(node, module, dim, closed, groups, centers=spec.centers)
