"""Products of two tensors: matmul, and attention as one operation.

Zeros meet in a product: a query channel whose key channel is 0 is not needed, and what a closed
value channel gives is 0 at every place. Heads stay alike: a channel goes where all heads close it.
"""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from prifu_plugin.prune.facts import Fact, any_over, channels_of, summarize
from prifu_plugin.prune.plan import Keep
from prifu_plugin.prune.planner import Planner
from prifu_plugin.prune.rules.base import Analysis, Rule
from prifu_plugin.prune.rules.opaque import OpaqueRule
from prifu_plugin.prune.seen import seen


class MatmulRule(OpaqueRule):
    """left @ right, of two tensors of one rank.

    Args:
        node: the node.
        left: (..., i, k).
        right: (..., k, j).
        convex: the rows of left sum to 1, so that a constant stays what it is.
    """

    def __init__(self, node: fx.Node, left: fx.Node, right: fx.Node, convex: bool) -> None:
        super().__init__(node, "matmul")
        self.left = left
        self.right = right
        self.convex = convex

    def const(self, analysis: Analysis) -> Fact:
        """Zero where every product has a zero; with a convex left, what right is everywhere."""
        left, right = analysis.fact(self.left), analysis.fact(self.right)
        met = _nonzero(left).unsqueeze(-1) & _nonzero(right).unsqueeze(-3)
        values = torch.where(met.any(-2), torch.nan, 0.0).double()
        if self.convex:
            first = right.const.narrow(-2, 0, 1)
            same = (right.const == first).all(-2, keepdim=True)
            values = torch.where(same & torch.isnan(values), first, values)
        shape, rank = seen(self.node).shape, len(seen(self.node).shape)
        axes = {axis for axis in left.axes if axis != rank - 1}
        axes |= {axis for axis in right.axes if axis != rank - 2}
        return summarize(values, shape, tuple(sorted(axes)))

    def need(self, analysis: Analysis) -> dict[fx.Node, Tensor]:
        """Need of each operand what meets no zero in the other."""
        wanted = analysis.wanted(self.node)
        left, right = analysis.fact(self.left), analysis.fact(self.right)
        by_left = (wanted.unsqueeze(-2) & _nonzero(right).unsqueeze(-3)).any(-1)
        by_right = (wanted.unsqueeze(-2) & _nonzero(left).unsqueeze(-1)).any(-3)
        return _merged([(self.left, left, by_left), (self.right, right, by_right)])

    def plan(self, planner: Planner) -> None:
        """Multiply what meets no zero; a parameter is multiplied whole."""
        analysis, rank = planner.analysis, len(seen(self.node).shape)
        left, right = analysis.fact(self.left), analysis.fact(self.right)
        kept = planner.kept(self.node)
        if kept is None:
            return
        if left.static or right.static:
            _plan_whole(self.node, planner, self.sources(analysis))
            return
        kept = {dim: indices for dim, indices in kept.items() if dim >= rank - 2}
        rows = {dim: indices for dim, indices in kept.items() if dim == rank - 2}
        columns = {dim: indices for dim, indices in kept.items() if dim == rank - 1}
        shared = self._shared(left, right)
        operands = {
            self.left: planner.conform(self.left, self.node, {**rows, rank - 1: shared}),
            self.right: planner.conform(self.right, self.node, {**columns, rank - 2: shared}),
        }
        if self.left is self.right and operands[self.left] != operands[self.right]:
            _plan_whole(self.node, planner, [self.left])
            return
        planner.emit(self.node, Keep(), operands, kept)

    def _shared(self, left: Fact, right: Fact) -> tuple[int, ...]:
        """Return the indices that are summed over and meet no zero; one at least."""
        met = _nonzero(left).unsqueeze(-1) & _nonzero(right).unsqueeze(-3)
        line = channels_of(met, -2)
        if len(line) == 1:
            return tuple(range(left.shape[-1]))
        return tuple(line.nonzero().flatten().tolist()) or (0,)


class AttentionRule(OpaqueRule):
    """softmax(query @ key^T) @ value as one operation, of three tensors of one rank."""

    def __init__(self, node: fx.Node, query: fx.Node, key: fx.Node, value: fx.Node) -> None:
        super().__init__(node, "attention")
        self.query = query
        self.key = key
        self.value = value

    def const(self, analysis: Analysis) -> Fact:
        """What a value channel is at every token stays what it is."""
        value, shape = analysis.fact(self.value), seen(self.node).shape
        heads = {a for n in (self.query, self.key) for a in analysis.fact(n).axes}
        axes = (heads | set(value.axes)) - {len(shape) - 1} | ({len(shape) - 1} & set(value.axes))
        const = value.const
        if self._may_hide_all():  # where a mask hides all tokens, torch returns 0
            const = torch.where(const == 0, const, torch.nan)
        return summarize(const, shape, tuple(sorted(axes)))

    def _may_hide_all(self) -> bool:
        mask = self.node.args[3] if len(self.node.args) > 3 else None
        mask = self.node.kwargs.get("attn_mask", mask)
        if not isinstance(mask, fx.Node):
            return False
        known = seen(mask).static
        return known is None or known.dtype == torch.bool or not torch.isfinite(known).all()

    def need(self, analysis: Analysis) -> dict[fx.Node, Tensor]:
        """Need the wanted channels of values; of queries and keys what meets no zero."""
        wanted = analysis.wanted(self.node)
        if not wanted.any():
            return {}
        found = self._all(analysis)  # a mask is needed whole
        for source in (self.query, self.key, self.value):
            found.pop(source, None)
        query, key = analysis.fact(self.query), analysis.fact(self.key)
        head = wanted.any(-1, keepdim=True)
        meets = head & _nonzero(query) & _nonzero(key)
        asked = [(self.query, query, meets), (self.key, key, meets)]
        return found | _merged([*asked, (self.value, analysis.fact(self.value), wanted)])

    def plan(self, planner: Planner) -> None:
        """Attend with the value channels that go on; the scale knows how wide queries are."""
        analysis, last = planner.analysis, len(seen(self.node).shape) - 1
        kept = planner.kept(self.node)
        if kept is None:
            return
        kept = {dim: indices for dim, indices in kept.items() if dim == last}
        if self.value in (self.query, self.key):
            kept = {}
        moving = [s for s in self.sources(analysis) if not analysis.fact(s).static]
        operands = {
            s: planner.conform(s, self.node, kept if s is self.value else {}) for s in moving
        }
        planner.emit(self.node, Keep(), operands, kept)


def contraction_rule(analysis: Analysis, node: fx.Node) -> Rule | None:
    """Return the rule for a product of two tensors or for attention, or None for another."""
    if node.target is F.scaled_dot_product_attention:
        return _attention(analysis, node)
    named = node.op == "call_method" and node.target in ("matmul", "bmm", "__matmul__")
    called = node.target in (torch.matmul, torch.bmm, operator.matmul)
    if not (named or called) or len(node.args) != 2 or node.kwargs:
        return None
    pair = [n for n in node.args if isinstance(n, fx.Node)]
    if len(pair) != 2 or not _of_one_rank(analysis, pair):
        return None
    if all(analysis.fact(n).static for n in pair):
        return None
    return MatmulRule(node, pair[0], pair[1], _is_convex(analysis, pair[0]))


def _attention(analysis: Analysis, node: fx.Node) -> Rule | None:
    triple = [n for n in node.args[:3] if isinstance(n, fx.Node)]
    if len(triple) != 3 or not _of_one_rank(analysis, triple):
        return None
    facts = [analysis.fact(n) for n in triple]
    rank = len(facts[0].shape)
    if node.kwargs.get("enable_gqa") or len(node.args) > 5 or node.kwargs.get("dropout_p"):
        return None
    alike = len({fact.shape[: rank - 2] for fact in facts}) == 1
    if not alike or any(rank - 2 in fact.axes or fact.static for fact in facts):
        return None
    return AttentionRule(node, triple[0], triple[1], triple[2])


def _of_one_rank(analysis: Analysis, nodes: list[fx.Node]) -> bool:
    facts = [analysis.values.get(n) for n in nodes]
    if not all(isinstance(fact, Fact) and len(fact.shape) >= 2 for fact in facts):
        return False
    zero_dim = any(seen(n).zero_dim for n in nodes)
    return len({len(analysis.fact(n).shape) for n in nodes}) == 1 and not zero_dim


_PASSING = (nn.Identity, nn.Dropout)


def _is_convex(analysis: Analysis, node: fx.Node) -> bool:
    """Whether a tensor is a softmax along its last dimension, dropout and the like aside."""
    module = analysis.module(node) if node.op == "call_module" else None
    source = node.args[0] if node.args else None
    if isinstance(module, _PASSING) or node.target in (F.dropout, "contiguous"):
        return isinstance(source, fx.Node) and _is_convex(analysis, source)
    last = (-1, len(seen(node).shape or ()) - 1)
    if type(module) is nn.Softmax:
        return module.dim in last
    if node.target not in (F.softmax, torch.softmax, "softmax"):
        return False
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return dim in last


def _nonzero(fact: Fact) -> Tensor:
    """Return a mask, shaped like the constants: live, or a constant that is not 0."""
    return fact.const != 0


def _merged(asked: list[tuple[fx.Node, Fact, Tensor]]) -> dict[fx.Node, Tensor]:
    found: dict[fx.Node, Tensor] = {}
    for source, fact, mask in asked:
        if fact.static:
            continue
        need = any_over(mask, fact)
        found[source] = found[source] | need if source in found else need
    return found


def _plan_whole(node: fx.Node, planner: Planner, sources: list[fx.Node]) -> None:
    analysis = planner.analysis
    if analysis.keep[node].any():
        moving = [source for source in sources if not analysis.fact(source).static]
        planner.emit(node, Keep(), {source: planner.conform(source, node) for source in moving})
