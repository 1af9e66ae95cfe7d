"""Operations on each element: activations, sums, products; and channel-preserving pooling."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from prifu_plugin.prune.facts import Fact, any_over, first_channel, summarize, tensor_inputs
from prifu_plugin.prune.layout import Conform, Layout
from prifu_plugin.prune.plan import Alias, Keep, Parameter
from prifu_plugin.prune.planner import Planner
from prifu_plugin.prune.rules.base import Analysis, Rule, first_input, run

PRODUCTS = {operator.mul, torch.mul, torch.multiply, "mul", "multiply"}
SCALINGS = {*PRODUCTS, operator.truediv, torch.div, torch.true_divide, "div", "true_divide"}
SUMS = {operator.add, torch.add, "add"}

POINTWISE = {
    *PRODUCTS,
    *SUMS,
    *(operator.sub, operator.truediv, operator.neg, operator.pow),
    *(torch.sub, torch.div, torch.true_divide, torch.neg, torch.pow, torch.square, torch.abs),
    *(torch.relu, torch.sigmoid, torch.tanh, torch.exp, torch.log, torch.sqrt, torch.rsqrt),
    *(torch.clamp, torch.clip, torch.erf, torch.sin, torch.cos, torch.maximum, torch.minimum),
    *(F.relu, F.relu6, F.gelu, F.silu, F.mish, F.elu, F.selu, F.celu, F.leaky_relu, F.softplus),
    *(F.hardswish, F.hardsigmoid, F.hardtanh, F.sigmoid, F.tanh, F.logsigmoid, F.softsign),
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d),
    *("sub", "div", "true_divide", "neg", "pow", "square", "abs", "relu", "sigmoid", "tanh"),
    *("exp", "log", "sqrt", "rsqrt", "clamp", "clip", "erf", "float", "double", "half", "to"),
    *("type", "clone", "detach"),
}
POINTWISE_MODULES = (
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
    *(nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.SELU, nn.CELU, nn.LeakyReLU),
    *(nn.Softplus, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh),
    *(nn.LogSigmoid, nn.Softsign, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.Threshold),
)


class PointwiseRule(Rule):
    """An operation whose result at an element depends on its operands there, with broadcasting."""

    def const(self, analysis: Analysis) -> Fact:
        """Run the operation on the constants; a product with a known 0 is 0."""
        shape = self.node.meta["shape"]
        facts = {n: analysis.fact(n) for n in tensor_inputs(self.node, analysis.values)}
        known = {n: _right(fact.known, len(shape)) for n, fact in facts.items()}
        out = run(analysis, self.node, lambda n: known[n] if n in known else analysis.values[n])
        live = torch.zeros([1] * len(shape), dtype=torch.bool)
        for fact in facts.values():
            live = live | _right(fact.live, len(shape))
        if self.node.target in PRODUCTS:
            for source in facts:
                zero = (known[source] == 0) & ~_right(facts[source].live, len(shape))
                live = live & ~zero
        if any(n not in facts and n.op != "get_attr" for n in self.node.all_input_nodes):
            # A size may stand in the formula: what it makes of constants holds at one resolution.
            zero = out == 0 if self.node.target in SCALINGS else torch.tensor(False)
            live = live | ~zero
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

    def need(self, analysis: Analysis) -> dict[fx.Node, Tensor]:
        """Need what is needed here, but not where the other factor is a known 0."""
        wanted = analysis.wanted(self.node)
        needs = {}
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
        return asked

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
                planner.emit(self.node, Alias(), {present[0]: operands[present[0]]}, wanted)
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
        return ordered

    def _operand(self, planner: Planner, source: fx.Node, wanted: Layout, rank: int) -> Conform:
        fact = planner.analysis.fact(source)
        shift = rank - len(fact.shape)
        target = {d - shift: kept for d, kept in wanted.items() if d >= shift}
        if fact.static:
            return _static_operand(planner, source, self.node, target)
        return planner.conform(source, self.node, target)


class ChannelwiseRule(Rule):
    """An operation on the other dimensions of each channel that keeps a constant what it is.

    Pooling, means over space, interpolation.

    Args:
        node: the node.
        dims: dimension of the input -> dimension of the result, for those that remain.
        shrinks_constants: zeros are padded and counted, so that a constant other than 0 is cut
            off at the border.
        gone: channel dimensions that a mean runs over; all of their channels are needed.
    """

    def __init__(
        self,
        node: fx.Node,
        dims: dict[int, int],
        shrinks_constants: bool = False,
        gone: set[int] | None = None,
    ) -> None:
        super().__init__(node)
        self.dims = dims
        self.gone = gone or set()
        self.shrinks_constants = shrinks_constants
        self.source = first_input(node)

    def const(self, analysis: Analysis) -> Fact:
        """Keep constants, dimension by dimension."""
        fact, shape = analysis.fact(self.source), self.node.meta["shape"]
        values = fact.const
        for dim in self.gone:
            values = values.mean(dim, keepdim=True)
        if self.shrinks_constants:
            values = torch.where(values == 0, values, torch.nan)
        axes = tuple(sorted(self.dims[axis] for axis in fact.axes if axis not in self.gone))
        summary = [size if d in axes else 1 for d, size in enumerate(shape)]
        return Fact(shape, axes, values.reshape(summary).clone())

    def need(self, analysis: Analysis) -> dict[fx.Node, Tensor]:
        """Need the same channels."""
        fact = analysis.fact(self.source)
        return {self.source: self._back(analysis.wanted(self.node), fact)}

    def want(self, analysis: Analysis) -> dict[fx.Node, Tensor]:
        """Want the same channels."""
        fact = analysis.fact(self.source)
        return {self.source: self._back(analysis.extra(self.node), fact)}

    def plan(self, planner: Planner) -> None:
        """Run it on the channels that go on."""
        kept = planner.kept(self.node)
        if kept is None:
            return
        back = {after: before for before, after in self.dims.items()}
        wanted = {back[dim]: indices for dim, indices in kept.items()}
        wanted = planner.in_order_of(self.source, wanted)
        layout = {self.dims[dim]: indices for dim, indices in wanted.items()}
        conform = planner.conform(self.source, self.node, wanted)
        planner.emit(self.node, Keep(), {self.source: conform}, layout)

    def _back(self, mask: Tensor, fact: Fact) -> Tensor:
        """Bring a mask over the result to the input's channels."""
        summary = [1 if d in self.gone else s for d, s in enumerate(fact.summary_shape())]
        return mask.reshape(summary).expand(fact.summary_shape()).clone()


def pointwise_rule(analysis: Analysis, node: fx.Node) -> Rule | None:
    """Return the rule for a pointwise or channelwise node, or None for another."""
    if node.op == "call_module":
        module = analysis.module(node)
        if isinstance(module, POINTWISE_MODULES):
            return PointwiseRule(node)
        return _pooling(analysis, node, module)
    if node.target in POINTWISE:
        facts = [analysis.fact(n) for n in tensor_inputs(node, analysis.values)]
        ranks = max((len(fact.shape) for fact in facts), default=0)
        same = ranks == len(node.meta["shape"])
        floating = torch.is_floating_point(node.meta["example"])
        return PointwiseRule(node) if same and floating else None
    if node.target in (torch.mean, "mean"):
        return _mean(analysis, node)
    return _functional_pooling(analysis, node)


_POOLS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d),
    *(nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample),
)
_FUNCTIONAL_POOLS = {
    *(F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.interpolate),
}


def _pooling(analysis: Analysis, node: fx.Node, module: nn.Module) -> Rule | None:
    known = any(type(module).forward is pool.forward for pool in _POOLS)
    if not known or not isinstance(module, _POOLS) or getattr(module, "return_indices", False):
        return None
    shrinks = isinstance(module, nn.AvgPool1d | nn.AvgPool2d) and (
        (module.count_include_pad and _positive(module.padding))
        or getattr(module, "divisor_override", None) is not None
    )
    return _over_space(analysis, node, shrinks)


def _functional_pooling(analysis: Analysis, node: fx.Node) -> Rule | None:
    if node.target not in _FUNCTIONAL_POOLS:
        return None
    padding: Any = 0
    if node.target is F.avg_pool2d:
        if len(node.args) > 6 or node.kwargs.get("divisor_override") is not None:
            return None
        padding = node.args[3] if len(node.args) > 3 else node.kwargs.get("padding", 0)
        counted = node.args[5] if len(node.args) > 5 else node.kwargs.get("count_include_pad", True)
        padding = padding if counted else 0
    return _over_space(analysis, node, _positive(padding))


def _over_space(analysis: Analysis, node: fx.Node, shrinks: bool) -> Rule | None:
    fact = analysis.input_fact(node)
    if fact is None or any(axis != 1 for axis in fact.axes) or len(fact.shape) < 3:
        return None
    if len(node.meta["shape"]) != len(fact.shape) or set(node.all_input_nodes) != {
        first_input(node)
    }:
        return None
    return ChannelwiseRule(node, {d: d for d in range(len(fact.shape))}, shrinks)


def _mean(analysis: Analysis, node: fx.Node) -> Rule | None:
    fact = analysis.input_fact(node)
    dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    keepdim = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    if fact is None or fact.static or "keepdims" in node.kwargs:
        return None
    rank = len(fact.shape)
    listed = dims if isinstance(dims, list | tuple) else [dims]
    if not listed or not all(isinstance(d, int) for d in listed):
        return None
    gone = {d % rank for d in listed}
    kept = [d for d in range(rank) if keepdim or d not in gone]
    return ChannelwiseRule(node, {d: p for p, d in enumerate(kept)}, gone=gone & set(fact.axes))


def _positive(padding: Any) -> bool:
    return any(p != 0 for p in padding) if isinstance(padding, tuple | list) else padding != 0


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


def _static_operand(planner: Planner, source: fx.Node, reader: fx.Node, target: Layout) -> Conform:
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
