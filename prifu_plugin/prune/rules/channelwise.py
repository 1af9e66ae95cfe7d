"""Operations on the other dimensions of each channel: pooling, means, interpolation, padding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from prifu_plugin.prune.facts import Fact
from prifu_plugin.prune.nodes import first_input
from prifu_plugin.prune.plan import Keep
from prifu_plugin.prune.planner import Planner
from prifu_plugin.prune.rules.base import Analysis, Rule
from prifu_plugin.prune.rules.moving import work_before
from prifu_plugin.prune.seen import seen


class ChannelwiseRule(Rule):
    """An operation on the other dimensions of each channel that keeps a constant what it is.

    Pooling, means over space, interpolation, padding.

    Args:
        node: the node.
        dims: dimension of the input -> dimension of the result, for those that remain.
        border: the value that is padded and counted, so that another constant is none any more;
            None if none is.
        gone: channel dimensions that are reduced over; all of their channels are needed.
        reduce: how, given a tensor and a dimension.
    """

    def __init__(
        self,
        node: fx.Node,
        dims: dict[int, int],
        border: float | None = None,
        gone: set[int] | None = None,
        reduce: Callable[..., Tensor] = torch.mean,
    ) -> None:
        super().__init__(node)
        self.dims = dims
        self.gone = gone or set()
        self.reduce = reduce
        self.border = border
        self.source = first_input(node)

    def const(self, analysis: Analysis) -> Fact:
        """Keep constants, dimension by dimension."""
        fact, shape = analysis.fact(self.source), seen(self.node).shape
        values = fact.const
        for dim in self.gone:
            values = self.reduce(values, dim, keepdim=True)
        if self.border is not None:
            values = torch.where(values == self.border, values, torch.nan)
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

    def work(self, analysis: Analysis) -> float:
        """Return what a channel of the input costs."""
        return work_before(analysis, self.source)

    def plan(self, planner: Planner) -> None:
        """Run it on the channels that go on."""
        kept = planner.kept(self.node)
        if kept is None:
            return
        back = {after: before for before, after in self.dims.items()}
        wanted = {back[dim]: indices for dim, indices in kept.items()}
        wanted = planner.in_order_of(self.source, wanted)
        wanted = planner.as_it_comes(self.source, wanted)
        layout = {self.dims[dim]: indices for dim, indices in wanted.items()}
        conform = planner.conform(self.source, self.node, wanted)
        planner.emit(self.node, Keep(), {self.source: conform}, layout)

    def _back(self, mask: Tensor, fact: Fact) -> Tensor:
        """Bring a mask over the result to the input's channels."""
        summary = [1 if d in self.gone else s for d, s in enumerate(fact.summary_shape())]
        return mask.reshape(summary).expand(fact.summary_shape()).clone()


def channelwise_rule(analysis: Analysis, node: fx.Node) -> Rule | None:
    """Return the rule for a channelwise node, or None for another."""
    if node.op == "call_module":
        return _pooling(analysis, node, analysis.module(node))
    if node.target in (torch.mean, "mean", torch.amax, "amax", torch.amin, "amin"):
        return _mean(analysis, node)
    if node.target in (torch.sum, "sum"):  # of zeros it is zero at every size
        return _mean(analysis, node, border=0.0)
    return _functional_pooling(analysis, node)


_POOLS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d),
    *(nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.Upsample),
    *(nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d),
)
_FUNCTIONAL_POOLS = {
    *(F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.interpolate),
    *(F.max_pool1d, F.adaptive_avg_pool1d, F.adaptive_max_pool1d),
    *(F.max_pool3d, F.adaptive_avg_pool3d, F.adaptive_max_pool3d),
    *(F.avg_pool1d, F.avg_pool3d),
}


def _pooling(analysis: Analysis, node: fx.Node, module: nn.Module) -> Rule | None:
    if not isinstance(module, _POOLS) or getattr(module, "return_indices", False):
        return None
    if all(type(module).forward is not pool.forward for pool in _POOLS):
        return None
    shrinks = isinstance(module, nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d) and (
        (module.count_include_pad and _positive(module.padding))
        or getattr(module, "divisor_override", None) is not None
    )
    return _over_space(analysis, node, shrinks)


def _functional_pooling(analysis: Analysis, node: fx.Node) -> Rule | None:
    if node.target not in _FUNCTIONAL_POOLS:
        return None
    padding: Any = 0
    if node.target in (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d):
        if len(node.args) > 6 or node.kwargs.get("divisor_override") is not None:
            return None
        padding = node.args[3] if len(node.args) > 3 else node.kwargs.get("padding", 0)
        counted = node.args[5] if len(node.args) > 5 else node.kwargs.get("count_include_pad", True)
        padding = padding if counted else 0
    return _over_space(analysis, node, _positive(padding))


def _over_space(analysis: Analysis, node: fx.Node, shrinks: bool) -> Rule | None:
    fact = analysis.input_fact(node)
    if fact is None or 0 in fact.axes or not _has_batch(analysis, node, len(fact.shape)):
        return None
    if len(seen(node).shape) != len(fact.shape) or not _is_alone(node):
        return None
    # Places, too, are known one by one where a model takes one size only.
    places = set(fact.axes) - {1}
    return ChannelwiseRule(node, _same(fact), 0.0 if shrinks else None, places, _agreed)


def _has_batch(analysis: Analysis, node: fx.Node, rank: int) -> bool:
    """Whether there is a batch before the channels: pools take a tensor of one rank less, too."""
    pool = type(analysis.module(node)) if node.op == "call_module" else node.target
    name = str(getattr(pool, "__name__", ""))
    places = next((int(n) for n in "123" if f"{n}d" in name.lower()), None)
    return rank > 2 if places is None else rank == places + 2


def _agreed(values: Tensor, dim: int, keepdim: bool) -> Tensor:
    """Return the constant that all places share along a dimension, NaN where there is none."""
    least, most = values.amin(dim, keepdim), values.amax(dim, keepdim)
    return torch.where(least == most, least, torch.nan)


def padding_rule(analysis: Analysis, node: fx.Node) -> Rule | None:
    """Return the rule for padding of dimensions that are no channels, or None for another."""
    if node.target is not F.pad:
        return None
    fact = analysis.input_fact(node)
    named = {"pad": 1, "mode": 2, "value": 3}
    given: dict[str, Any] = {
        **node.kwargs,
        **{k: node.args[i] for k, i in named.items() if len(node.args) > i},
    }
    pads, mode, value = given["pad"], given.get("mode", "constant"), given.get("value") or 0.0
    if fact is None or fact.static or not _is_alone(node):
        return None
    if not isinstance(pads, list | tuple) or isinstance(value, fx.Node):
        return None
    rank = len(fact.shape)
    padded = {rank - 1 - at // 2 for at, size in enumerate(pads) if size != 0}
    if padded & set(fact.axes):
        return None
    seen = mode == "constant" and not (value == -math.inf and _is_only_pooled(analysis, node, pads))
    return ChannelwiseRule(node, _same(fact), float(value) if seen else None)


def _is_only_pooled(analysis: Analysis, node: fx.Node, pads: Sequence[Any]) -> bool:
    """Whether max pooling alone reads a padding by -inf, in windows wider than it: none is left."""
    if any(isinstance(p, fx.Node) and seen(p).moves for p in pads):
        return False  # it may be wider at another size
    widths = [seen(p).example if isinstance(p, fx.Node) else p for p in pads]
    for user in node.users:
        if user.op == "call_module":
            module = analysis.module(user)
            kernel = getattr(module, "kernel_size", None)
            pools = (
                isinstance(module, nn.MaxPool2d) and type(module).forward is nn.MaxPool2d.forward
            )
        else:
            kernel = user.args[1] if len(user.args) > 1 else user.kwargs.get("kernel_size")
            pools = user.target is F.max_pool2d
        sides = kernel if isinstance(kernel, tuple | list) else (kernel,)
        if not pools or not all(isinstance(k, int) and k > max(widths) for k in sides):
            return False
    return bool(node.users)


def _is_alone(node: fx.Node) -> bool:
    """Whether all inputs but the first are sizes."""
    return not any(seen(source).shape for source in node.all_input_nodes[1:])


def _same(fact: Fact) -> dict[int, int]:
    return {dim: dim for dim in range(len(fact.shape))}


def _mean(analysis: Analysis, node: fx.Node, border: float | None = None) -> Rule | None:
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
    back = {d: p for p, d in enumerate(kept)}
    name = getattr(node.target, "__name__", node.target)
    reduce = {"amax": torch.amax, "amin": torch.amin}.get(str(name), torch.mean)
    return ChannelwiseRule(node, back, border, gone & set(fact.axes), reduce)


def _positive(padding: Any) -> bool:
    return any(p != 0 for p in padding) if isinstance(padding, tuple | list) else padding != 0
