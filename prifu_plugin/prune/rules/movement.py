"""Data movement: one rule for view, permute, chunk, roll, window partition and all their kin.

An operation moves data if it commutes with every relabelling of values. Then running it on a
tensor of labels 1, 2, 3 ... says where each element came from (0 for padded zeros), and that is
all there is to know: constants, need and layouts follow by indexing.
"""

from __future__ import annotations

import math
import operator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from prifu_plugin.prune.facts import Fact, any_over, channels_of, is_fact_tuple, summarize
from prifu_plugin.prune.layout import Conform, Layout, restrict, simplify
from prifu_plugin.prune.nodes import first_input
from prifu_plugin.prune.plan import Alias, Keep
from prifu_plugin.prune.planner import Planner
from prifu_plugin.prune.rules.base import Analysis, Rule
from prifu_plugin.prune.rules.relabel import Moved, Start, moved_labels, starts
from prifu_plugin.prune.rules.selection import fixed_crop, order, selection
from prifu_plugin.prune.rules.sizes import patched_sizes, resized
from prifu_plugin.prune.seen import seen


class MovementRule(Rule):
    """Movement of one tensor to one or several.

    Args:
        node: the node.
        source: the tensor whose elements are moved: the operand, or what an operand that mixes
            channels with other dimensions was made from.
        moved: where the elements of each result came from.
    """

    def __init__(self, node: fx.Node, source: fx.Node, moved: tuple[Moved, ...]) -> None:
        super().__init__(node)
        self.source = source
        self.moved = moved

    @property
    def mixed(self) -> bool:
        """Whether channels are spread over dimensions that are no channel dimensions."""
        return any(m.mixed for m in self.moved)

    def sources(self, analysis: Analysis) -> list[fx.Node]:
        """Return the tensor whose elements are moved."""
        return [self.source]

    def const(self, analysis: Analysis) -> Any:
        """Move the constants."""
        fact = analysis.fact(self.source)
        flat = torch.cat([torch.zeros(1).double(), fact.const.expand(fact.shape).flatten()])
        facts = tuple(_moved_fact(flat, moved) for moved in self.moved)
        return facts if seen(self.node).several else facts[0]

    def need(self, analysis: Analysis) -> dict[fx.Node, Tensor]:
        """Move need back."""
        return self._back(analysis, lambda node: analysis.wanted(node))

    def want(self, analysis: Analysis) -> dict[fx.Node, Tensor]:
        """Move wants back."""
        return self._back(analysis, lambda node: analysis.extra(node))

    def _back(self, analysis: Analysis, mask_of: Any) -> dict[fx.Node, Tensor]:
        fact = analysis.fact(self.source)
        if seen(self.node).several:
            if _only_items(analysis, self.node):
                return {}
            return {self.source: torch.ones(fact.summary_shape(), dtype=torch.bool)}
        moved = self.moved[0]
        mask = mask_of(self.node).expand(moved.labels.shape)
        flat = torch.zeros(math.prod(fact.shape) + 1, dtype=torch.bool)
        flat[moved.labels[mask]] = True
        return {self.source: any_over(flat[1:].reshape(fact.shape), fact)}

    def plan(self, planner: Planner) -> None:
        """Plan the whole chain of movements that ends here."""
        if seen(self.node).several:
            if not _only_items(planner.analysis, self.node):
                _step(planner, self.node)
            return
        if _is_inner(planner.analysis, self.node):
            return
        if planner.analysis.keep[self.node].any():
            _plan_chain(planner, self.node)


def _moved_fact(flat: Tensor, moved: Moved) -> Fact:
    """Return the fact of a result; where zeros may surround it, constants but 0 are none."""
    fact = summarize(flat[moved.labels], tuple(moved.labels.shape), moved.axes)
    if not moved.padded:
        return fact
    return replace(fact, const=torch.where(fact.const == 0, fact.const, torch.nan))


class ItemRule(MovementRule):
    """One item of a tuple of tensors: movement from the tensor that was split."""


def movement_rule(analysis: Analysis, node: fx.Node) -> Rule | None:
    """Return the rule if a node moves data, found by relabelling; None otherwise."""
    sources = [
        s
        for s in node.all_input_nodes
        if isinstance(analysis.values.get(s), Fact) or is_fact_tuple(analysis.values.get(s))
    ]
    if len(sources) != 1:
        return None
    source = sources[0]
    if not node.args or node.args[0] is not source or seen(source).zero_dim:
        return None
    if is_fact_tuple(analysis.values[source]):
        split = analysis.rules[source]
        item = node.args[1] if node.target is operator.getitem else None
        if not isinstance(split, MovementRule) or not isinstance(item, int):
            return None
        return ItemRule(node, split.source, (split.moved[item],))
    origin, begin = source, starts(source, analysis.fact(source))
    before = analysis.rules[source]
    if isinstance(before, MovementRule) and before.mixed:
        origin, begin = before.source, _continued(analysis, before)
    moved = moved_labels(analysis, node, source, analysis.fact(origin), begin)
    return MovementRule(node, origin, moved) if moved else None


def _continued(analysis: Analysis, before: MovementRule) -> tuple[Start, ...]:
    """Return the labels that a movement left, for the next one to move on."""
    fresh = starts(before.source, analysis.fact(before.source))
    left = (before.moved[0].labels, before.moved[0].other)
    return tuple(
        Start(labels.double(), start.shape, id(before.moved[0]))
        for labels, start in zip(left, fresh, strict=False)
        if labels is not None
    )


# Planning. A chain of movements is planned as a whole where only its end is read.


def _is_inner(analysis: Analysis, node: fx.Node) -> bool:
    """Whether only other movements read a node."""
    return bool(node.users) and all(
        isinstance(analysis.rules.get(user), MovementRule)
        and node in _data_inputs(user)
        and not (seen(user).several and not _only_items(analysis, user))
        for user in node.users
    )


def _only_items(analysis: Analysis, node: fx.Node) -> bool:
    """Whether a tuple is only read item by item."""
    return all(isinstance(analysis.rules.get(user), ItemRule) for user in node.users)


def _data_inputs(node: fx.Node) -> list[fx.Node]:
    first = node.args[0] if node.args else None
    return [first] if isinstance(first, fx.Node) else []


def _plan_chain(planner: Planner, end: fx.Node) -> None:
    analysis = planner.analysis
    chain = [end]
    while True:
        first = first_input(chain[0])
        rule = analysis.rules.get(first)
        inner = isinstance(rule, MovementRule) and (
            seen(first).several
            or (not planner.exists(first) and (rule.mixed or _is_inner(analysis, first)))
        )
        if not inner:
            break
        chain.insert(0, first)
    start = first_input(chain[0])
    if planner.exists(start) and not planner.layouts[start] and bool(analysis.keep[end].all()):
        for node in chain:
            _keep_whole(planner, node)
        return
    if (
        planner.exists(start)
        and not _may_do_more(analysis, chain)
        and _relabel(planner, start, chain)
    ):
        return
    for node in chain:
        if not planner.exists(node):
            _step(planner, node)


def _may_do_more(analysis: Analysis, chain: list[fx.Node]) -> bool:
    """Whether a chain may do at other sizes what it did not at those that were run."""
    rules = [analysis.rules[node] for node in chain]
    loose = any(m.loose for rule in rules if isinstance(rule, MovementRule) for m in rule.moved)
    return loose or fixed_crop(analysis, chain)


def _keep_whole(planner: Planner, node: fx.Node) -> None:
    if not planner.exists(node):
        planner.emit(node, Keep())


def _relabel(planner: Planner, start: fx.Node, chain: list[fx.Node]) -> bool:
    """Plan the chain as a selection along one dimension, if that is all it does."""
    analysis, end = planner.analysis, chain[-1]
    source, result = analysis.fact(start), analysis.fact(end)
    if len(source.shape) != len(result.shape):
        return False
    runs = _composed(analysis, start, chain)
    for dim in source.axes:
        if dim not in result.axes or set(planner.layouts[start]) - {dim}:
            continue
        mappings = [selection(labels, shape, dim) for labels, shape in runs]
        mapping = mappings[0] if mappings else None
        if mapping is None or any(other != mapping for other in mappings):
            continue
        have = {index: p for p, index in enumerate(planner.physical(start, dim))}
        keep = channels_of(analysis.keep[end], dim)
        chosen = [
            (have[origin], out)
            for out, origin in enumerate(mapping)
            if origin in have and bool(keep[out])
        ]
        needed = int(keep.sum())
        if not chosen or len(chosen) < needed:
            return False
        chosen.sort()
        positions = tuple(position for position, _ in chosen)
        whole = positions == tuple(range(len(have)))
        conform = Conform() if whole else Conform(((dim, positions),))
        layout = {dim: tuple(out for _, out in chosen)}
        planner.emit(end, Alias(start.name), {start: conform}, layout)
        return True
    return False


def _composed(
    analysis: Analysis, start: fx.Node, chain: list[fx.Node]
) -> list[tuple[Tensor, tuple[int, ...]]]:
    """Return the labels of the start at the end of a chain, and its shape, in each run."""
    at: dict[fx.Node, list[Tensor]] = {}
    shapes = [s.shape for s in starts(start, analysis.fact(start))]
    for node in chain:
        rule = analysis.rules[node]
        assert isinstance(rule, MovementRule)
        if seen(node).several:
            continue
        steps = [step for step in (rule.moved[0].labels, rule.moved[0].other) if step is not None]
        if rule.source is not start and rule.source not in at:
            return []
        if rule.source is not start:
            zero = torch.zeros(1, dtype=torch.int64)
            before = [torch.cat([zero, labels.flatten()]) for labels in at[rule.source]]
            steps = [labels[step] for labels, step in zip(before, steps, strict=True)]
        at[node] = steps
    return list(zip(at[chain[-1]], shapes, strict=True))


def _step(planner: Planner, node: fx.Node) -> None:
    """Plan one movement on the layout of its operand; on the whole operand if that fails."""
    analysis = planner.analysis
    rule = analysis.rules[node]
    assert isinstance(rule, MovementRule)
    operand = first_input(node)
    if isinstance(rule, ItemRule) and not isinstance(analysis.values[operand], Fact):
        planner.emit(node, Keep())
        return
    if seen(node).several:
        planner.emit(node, Keep(), {operand: planner.conform(operand, node)})
        return
    if planner.exists(operand) and planner.layouts[operand] and rule.source is operand:
        direct = _direct(analysis, node, rule, planner.layouts[operand])
        if direct is not None:
            kernel, layout = direct
            planner.emit(node, kernel, {}, layout)
            return
    planner.emit(node, Keep(), {operand: planner.conform(operand, node)})


def _direct(
    analysis: Analysis, node: fx.Node, rule: MovementRule, operand: Layout
) -> tuple[Keep, Layout] | None:
    """Run the operation on the labels that exist; accept if the result is a product of sets."""
    fact, moved = analysis.fact(rule.source), rule.moved[0]
    size = math.prod(fact.shape)
    labels = torch.arange(1, size + 1, dtype=torch.float64).reshape(fact.shape)
    there = restrict(labels, operand).long()
    present = torch.zeros(size + 1, dtype=torch.bool)
    present[there.flatten()] = True
    shown = present[moved.labels]
    sets = {}
    for axis in moved.axes:
        line = channels_of(shown, axis)
        sets[axis] = tuple(line.nonzero().flatten().tolist())
    if any(not kept for kept in sets.values()) or _misses(analysis, node, sets):
        return None
    sizes = patched_sizes(analysis, node, {axis: len(kept) for axis, kept in sets.items()})
    values = restrict(labels, operand)
    try:
        result = resized(analysis, node, rule.source, values, sizes).long()
    except Exception:  # noqa: BLE001 - then the whole operand is used
        return None
    if result.ndim != moved.labels.ndim:
        return None
    layout = order(result, moved.labels, sets)
    if layout is None or not torch.equal(restrict(moved.labels, layout), result):
        return None
    return Keep(sizes), simplify(tuple(moved.labels.shape), layout)


def _misses(analysis: Analysis, node: fx.Node, sets: dict[int, tuple[int, ...]]) -> bool:
    """Whether a channel that is wanted would be missing: constant here and there, but not alike."""
    wanted = analysis.wanted(node)
    for axis, kept in sets.items():
        line = channels_of(wanted, axis)
        line[list(kept)] = False
        if line.any():
            return True
    return False
